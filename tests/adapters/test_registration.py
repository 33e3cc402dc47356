"""MixLoRA is known to PEFT whichever of the two is imported first, and neither costs the other."""

from __future__ import annotations

import subprocess
import sys

import pytest

KNOWN = """
import peft
assert peft.PeftType("MIXLORA").value == "MIXLORA"
config = peft.get_peft_config({"peft_type": "MIXLORA", "num_experts": 3})
assert type(config).__name__ == "MixLoraConfig" and config.num_experts == 3
from peft import mapping
assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["MIXLORA"].__name__ == "MixLoraModel"
assert not any(type(finder).__module__.startswith("mixlora") for finder in sys.meta_path)
assert peft.__spec__.loader is peft.__loader__
assert not type(peft.__loader__).__module__.startswith("mixlora")
"""
# The second import of the package finds PEFT loaded and what the first one registered gone.
AGAIN = """
del mapping.PEFT_TYPE_TO_TUNER_MAPPING["MIXLORA"], mapping.PEFT_TYPE_TO_CONFIG_MAPPING["MIXLORA"]
for name in [name for name in sys.modules if name.startswith("mixlora_exp")]:
    del sys.modules[name]
import mixlora_exp
"""
SCRIPTS = {
    # `transformers.utils.is_peft_available` looks for PEFT so; that must not use the hook up.
    "package first, then PEFT first": "import sys, mixlora_exp\n"
    "from importlib.util import find_spec\n"
    "assert find_spec('peft') and find_spec('peft') and 'peft' not in sys.modules"
    + KNOWN
    + AGAIN
    + KNOWN,
    "configuration alone": "import sys, mixlora_exp.config\n"
    "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)",
}
SLOW_SCRIPTS = {
    "PEFT first": "import sys, peft, mixlora_exp" + KNOWN,
    # They import PEFT, which by the hook imports them.
    "adapters alone": "import sys, mixlora_exp.adapters" + KNOWN,
}


@pytest.mark.parametrize(
    "script",
    [
        *(pytest.param(script, id=name) for name, script in SCRIPTS.items()),
        *(
            pytest.param(script, id=name, marks=pytest.mark.slow)
            for name, script in SLOW_SCRIPTS.items()
        ),
    ],
)
def test_imports(script) -> None:
    """In a process of its own: imports leave traces."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode()[-2000:]


def test_adapters_need_nothing_of_the_harness(tmp_path) -> None:
    """Torch, transformers and peft are enough to make, run, save and load an adapter."""
    code = """
import sys
for name in ("hydra", "omegaconf", "datasets", "gguf"):
    sys.modules[name] = None
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from mixlora_exp.adapters import MixLoraConfig
def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=50,
    ))
ids = torch.arange(8).view(1, 8)
model = get_peft_model(base(), MixLoraConfig(r=2, init_lora_weights=False)).eval()
expected = model(input_ids=ids).logits
model.save_pretrained(sys.argv[1])
loaded = PeftModel.from_pretrained(base(), sys.argv[1]).eval()
assert torch.equal(loaded(input_ids=ids).logits, expected)
assert not torch.equal(base().eval()(input_ids=ids).logits, expected)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""Steps of the packages moe-peft and mixlora, one a line: run by `kinds.peers` in their venv.

Reads what to build as JSON from the first argument, answers `ready`, and then each line on standard
input with one step's seconds as JSON. Imports nothing of this project.
"""

import json
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ADAPTER = {
    "bias": "none",
    "peft_type": "MIXLORA",
    "r": 16,
    "lora_alpha": 32,
    "routing_strategy": "mixlora",
    "num_experts": 8,
    "act_fn": "silu",
    "top_k": 2,
    "base_model_name_or_path": "random",
    "task_type": "CAUSAL_LM",
}


def adapter_of(spec: dict) -> dict:
    """Return the packages' adapter settings, on each projection."""
    targets = [*spec["attention"], *spec["feed_forward"]]
    own = {"lora_dropout": spec["dropout"], "use_dora": spec["dora"]}
    return {**ADAPTER, "target_modules": targets, **own}


def base(spec: dict) -> LlamaForCausalLM:
    """Return a Llama of the given shape with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**spec["shape"], attn_implementation="eager")
    model = LlamaForCausalLM(config).to(getattr(torch, spec["dtype"]))
    return model.requires_grad_(False)


def moe_peft_step(spec: dict):
    """Return a training step of moe-peft's MixLoRA as its trainer takes it, without
    recomputation."""
    from moe_peft.adapters import lora_config_factory
    from moe_peft.common import LLMBatchConfig, LLMModelInput
    from moe_peft.model import LLMModel
    from moe_peft.models import from_pretrained

    inner = from_pretrained(base(spec), attn_impl="eager", use_sliding_window=False, device="cpu")
    model = LLMModel(inner)
    config = lora_config_factory(adapter_of(spec))
    config.adapter_name = "a"
    model.init_adapter(config)
    weights = model.get_adapter_weight_dict("a")
    for name, weight in weights.items():
        weight.requires_grad_(True)
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.02)
    shape = (spec["batch"], spec["length"])
    ids = torch.randint(spec["shape"]["vocab_size"], shape)

    def step() -> dict:
        inputs = LLMModelInput(
            batch_configs_=[LLMBatchConfig("a", 0, shape[0])],
            batch_tokens_=ids,
            batch_labels_=ids,
            batch_masks_=torch.ones_like(ids),
        )
        start = time.perf_counter()
        (output,) = model(inputs)
        loss = output.loss if output.aux_loss is None else output.loss + output.aux_loss
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        for weight in weights.values():
            weight.grad = None
        return {"train_forward_s": middle - start, "train_backward_s": end - middle}

    return step


def mixlora_step(spec: dict):
    """Return a forward pass of the package mixlora, which has inference only. Its experts stand
    outside of the module tree, so that `eval()` leaves their dropout on, and it refuses a dropout
    of 0: measured as it runs."""
    from mixlora.config import MixLoraConfig
    from mixlora.model import inject_adapter_in_model

    model = base(spec)
    config = MixLoraConfig.from_config(adapter_of(spec))
    config.adapter_name_, config.dtype_ = "a", torch.float32
    shape, rank = spec["shape"], ADAPTER["r"]
    weights = {}

    def draw(name: str, layer: torch.nn.Linear) -> None:
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features) * 0.02
        weights[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank) * 0.02

    for number, block in enumerate(model.model.layers):
        prefix = f"mixlora.layers.{number}"
        router = torch.randn(ADAPTER["num_experts"], shape["hidden_size"]) * 0.02
        weights[f"{prefix}.mlp.moe_gate.weight"] = router
        for name in spec["attention"]:
            draw(f"{prefix}.self_attn.{name}", getattr(block.self_attn, name))
        for name in spec["feed_forward"]:
            for expert in range(ADAPTER["num_experts"]):
                draw(f"{prefix}.mlp.{name}.experts.{expert}", getattr(block.mlp, name))
    inject_adapter_in_model(model, config, weights)
    model.eval()
    ids = torch.randint(shape["vocab_size"], (spec["batch"], spec["length"]))

    @torch.no_grad()
    def step() -> dict:
        start = time.perf_counter()
        model(input_ids=ids, num_logits_to_keep=1)
        return {"infer_forward_s": time.perf_counter() - start}

    return step


STEPS = {"moe_peft": moe_peft_step, "mixlora": mixlora_step}


def main() -> None:
    """Build the model, then one step per line."""
    spec = json.loads(sys.argv[1])
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    step = STEPS[spec["package"]](spec)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


if __name__ == "__main__":
    main()

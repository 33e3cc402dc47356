"""Which tests have to notice a mutant of a file."""

from __future__ import annotations

from fnmatch import fnmatch

LEFT_OUT = ("tests/kernels/test_block_kernels.py::test_kernel_is_as_precise_as_the_reference",)
"""Takes longer than all others of its file."""
PLAIN = (
    "tests/kernels/test_dora_norms.py",
    "tests/kernels/test_activations.py",
    "tests/kernels/test_eager_linear.py",
    "tests/kernels/test_lora_linear.py::test_equals_the_definition",
    "tests/kernels/test_lora_linear.py::test_the_form_of_other_devices_is_the_definition",
    "tests/kernels/test_lora_linear.py::test_is_each_adapter_by_itself",
    "tests/kernels/test_block_kernels.py",
    "tests/kernels/test_needed_gradients.py::test_linear_layers",
    "tests/kernels/test_kernels_under_dropout.py",
    "tests/kernels/test_grouped_rows.py",
    "tests/kernels/test_double_backward.py",
    # With rows that the router leaves to the frozen block.
    "tests/kernels/test_routers.py",
    "tests/kernels/test_router_formulas.py",
)
SHARED_INPUT = (*PLAIN, "tests/adapters/test_shared_input.py")
CAST_WEIGHTS = (
    *PLAIN,
    "tests/adapters/test_weight_cache.py",
    "tests/adapters/test_weight_cache_work.py",
)
BYTES_KEPT = (*PLAIN, "tests/plans/test_kept.py")
ROUTERS = (
    "tests/kernels/test_routers.py",
    "tests/kernels/test_router_formulas.py",
    "tests/kernels/test_router_statistics.py",
    "tests/kernels/test_router_ties.py",
    "tests/kernels/test_nan.py",
)
MIXTURES = (
    "tests/adapters/mixtures/test_formulas.py",
    "tests/adapters/mixtures/test_loss_formulas.py",
    "tests/adapters/mixtures/test_losses.py",
    "tests/adapters/mixtures/test_adapters.py",
    "tests/kernels/test_singular_starts.py",
)
TRITON_LINEAR = ("tests/kernels/test_triton_linear.py", "tests/adapters/test_linear_launches.py")
TRITON = (
    "tests/kernels/test_triton_order.py",
    "tests/kernels/test_triton.py",
    "tests/kernels/test_triton_nan.py",
    "tests/kernels/test_launches.py",
    "tests/kernels/test_low_rank_flops.py",
)

SEED = 2028
"""Of the draw; that of the record."""
TESTS = {
    "kernels/triton/hashing.py": (
        "tests/kernels/test_triton_hashing.py", *TRITON_LINEAR, "tests/kernels/test_triton.py"
    ),
    "kernels/triton/linear*.py": TRITON_LINEAR,
    "kernels/triton/narrow.py": TRITON_LINEAR,
    "kernels/triton/router.py": (
        "tests/kernels/test_triton_router.py", "tests/kernels/test_launches.py"
    ),
    "kernels/triton/*": (*TRITON, *TRITON_LINEAR),
    "kernels/mixtures/lora_ga.py": (*MIXTURES, "tests/training/test_method_formulas.py"),
    "kernels/mixtures/*": MIXTURES,
    "kernels/mixture_base.py": MIXTURES,
    "kernels/routers/*": ROUTERS,
    "kernels/router_base.py": (*ROUTERS, "tests/training/test_gradient_check.py"),
    "kernels/*router*.py": ROUTERS,
    "kernels/dropout.py": (
        "tests/kernels/test_dropout_masks.py",
        "tests/kernels/test_eager_linear.py",
        "tests/training/test_masks.py",
    ),
    "kernels/hashing.py": (
        "tests/kernels/test_dropout_masks.py", "tests/kernels/test_triton_hashing.py"
    ),
    "kernels/loss.py": ("tests/training/test_head.py",),
    "kernels/quantized.py": ("tests/adapters/test_quantized.py",),
    "kernels/frozen.py": SHARED_INPUT,
    "kernels/low_rank.py": SHARED_INPUT,
    "kernels/plain_linear.py": SHARED_INPUT,
    "kernels/dora.py": CAST_WEIGHTS,
    "kernels/precision.py": CAST_WEIGHTS,
    "kernels/shapes.py": CAST_WEIGHTS,
    "kernels/mixlora/exact.py": (*BYTES_KEPT, "tests/kernels/test_compiled.py"),
    "kernels/mixlora/*": BYTES_KEPT,
    "kernels/registry.py": BYTES_KEPT,
    "kernels/*": PLAIN,
    "records/canonical_code.py": ("tests/results/test_canonical_code.py", "tests/test_hashing.py"),
    "records/card.py": ("tests/results/test_card.py",),
    "records/checkout.py": ("tests/results/test_checkout.py", "tests/results/test_record.py"),
    "records/code_hash.py": ("tests/test_hashing.py",),
    "records/files.py": (
        "tests/results/test_packed_runs.py",
        "tests/results/test_collect.py",
        "tests/results/test_comparison.py",
    ),
    "records/objections.py": (
        "tests/results/test_objections.py",
        "tests/results/test_collect.py", "tests/results/test_left_out_records.py"
    ),
    "records/outcome.py": ("tests/results/test_outcome.py",),
    "records/record.py": (
        "tests/results/test_record.py",
        "tests/results/test_required_fields.py",
        "tests/results/test_packed_runs.py",
    ),
    "records/required_fields.py": (
        "tests/results/test_required_fields.py",
        "tests/results/test_left_out_records.py",
        "tests/results/test_records_of_others.py",
        "tests/fuzz/test_odd_records.py",
    ),
    "records/spikes.py": ("tests/training/test_stability.py::test_spikes_by_hand",),
    "records/wilson.py": ("tests/results/test_card.py", "tests/results/test_statistics.py"),
    "records/layout.py": ("tests/results/test_outcome.py", "tests/results/test_show.py"),
    "records/*": ("tests/results/test_show.py", "tests/results/test_score_warnings.py"),
    "system/runlock.py": (
        "tests/faults/test_lock_files.py",
        "tests/faults/test_runlock.py",
        "tests/fuzz/test_odd_locks.py",
    ),
    "results/statistics/*": (
        "tests/results/test_statistics.py",
        "tests/results/test_statistics_by_hand.py",
    ),
}  # fmt: skip
"""Pattern of files -> tests, the quickest and most telling first; the first pattern that fits."""


def tests_of(file: str) -> tuple[str, ...]:
    """The tests for a file, which is named from the repository's root, each once."""
    inside = file.removeprefix("src/mixlora_exp/")
    return tuple(dict.fromkeys(next(t for p, t in TESTS.items() if fnmatch(inside, p))))

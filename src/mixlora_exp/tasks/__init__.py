"""The eight tasks: their schema, prompts, labels and official sizes."""

from __future__ import annotations

from mixlora_exp.tasks.arc import ARC_C, ARC_E
from mixlora_exp.tasks.base import Item, Prompt, Task, lettered
from mixlora_exp.tasks.boolq import BOOLQ
from mixlora_exp.tasks.characters import check_characters
from mixlora_exp.tasks.custom import custom_task
from mixlora_exp.tasks.hellaswag import HELLASWAG
from mixlora_exp.tasks.obqa import OBQA
from mixlora_exp.tasks.piqa import PIQA
from mixlora_exp.tasks.siqa import SIQA
from mixlora_exp.tasks.winogrande import WINOGRANDE

__all__ = ["TASKS", "Item", "Prompt", "Task", "check_characters", "custom_task", "lettered"]

TASKS: dict[str, Task] = {
    task.name: task for task in (ARC_E, ARC_C, BOOLQ, OBQA, PIQA, SIQA, HELLASWAG, WINOGRANDE)
}
"""The tasks by name, in the order of the tables."""

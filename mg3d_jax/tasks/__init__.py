"""Downstream tasks that are trained with the objectives or alone, declared in the same form (`objectives.base.Objective`)."""

from mg3d_jax.registry import TASKS
from mg3d_jax.tasks.classification import CLASSIFICATION
from mg3d_jax.tasks.generation import GENERATION
from mg3d_jax.tasks.segmentation import SEGMENTATION
from mg3d_jax.tasks.vocabulary import VOCABULARY

TASKS.register("classification", CLASSIFICATION)
TASKS.register("vocabulary", VOCABULARY)
TASKS.register("generation", GENERATION)
TASKS.register("segmentation", SEGMENTATION)

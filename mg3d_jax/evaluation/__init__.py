"""What a trained run can do, with the protocol of every number named. An evaluation is one file here and one line below."""

from mg3d_jax.evaluation import clinical_efficacy
from mg3d_jax.evaluation.classification import Classification
from mg3d_jax.evaluation.generation import Generation
from mg3d_jax.evaluation.negation import Negation
from mg3d_jax.evaluation.pool_loss import PoolLoss
from mg3d_jax.evaluation.probe import Probe
from mg3d_jax.evaluation.rescoring import Rescoring
from mg3d_jax.evaluation.retrieval import Retrieval
from mg3d_jax.evaluation.segmentation import Segmentation
from mg3d_jax.evaluation.sides import Sides
from mg3d_jax.evaluation.volume_retrieval import VolumeRetrieval
from mg3d_jax.evaluation.zero_shot import ZeroShot
from mg3d_jax.registry import EVALUATIONS, LABELLERS

EVALUATIONS.register("zero_shot", ZeroShot)
EVALUATIONS.register("retrieval", Retrieval)
EVALUATIONS.register("rescoring", Rescoring)
EVALUATIONS.register("pool_loss", PoolLoss)
EVALUATIONS.register("sides", Sides)
EVALUATIONS.register("negation", Negation)
EVALUATIONS.register("volume_retrieval", VolumeRetrieval)
EVALUATIONS.register("probe", Probe)
EVALUATIONS.register("classification", Classification)
EVALUATIONS.register("generation", Generation)
EVALUATIONS.register("segmentation", Segmentation)
LABELLERS.register("rules", clinical_efficacy.rules)

# Written by .ci/stubs.py: change the notebook, then run `make export`
from fastxtend.optimizer.adabelief import AdaBelief as AdaBelief, adabelief as adabelief
from fastxtend.optimizer.adan import Adan as Adan, adan as adan
from fastxtend.optimizer.ademamix import AdEMAMix as AdEMAMix, ademamix as ademamix
from fastxtend.optimizer.adopt import ADOPT as ADOPT, adopt as adopt
from fastxtend.optimizer.declare import ForEachLookahead as ForEachLookahead, StepperLookahead as StepperLookahead, StepperOptimizer as StepperOptimizer
from fastxtend.optimizer.foreach import AdamForEachOptimizer as AdamForEachOptimizer, ForEachOptimizer as ForEachOptimizer, LambForEachOptimizer as LambForEachOptimizer, LarcForEachOptimizer as LarcForEachOptimizer, QHAdamForEachOptimizer as QHAdamForEachOptimizer, RAdamForEachOptimizer as RAdamForEachOptimizer, RMSPropForEachOptimizer as RMSPropForEachOptimizer, RangerForEachOptimizer as RangerForEachOptimizer, SGDForEachOptimizer as SGDForEachOptimizer
from fastxtend.optimizer.fused import Adam as Adam, Lamb as Lamb, Larc as Larc, QHAdam as QHAdam, RAdam as RAdam, RMSProp as RMSProp, Ranger as Ranger, SGD as SGD, adam as adam, lamb as lamb, larc as larc, qhadam as qhadam, radam as radam, ranger as ranger, rmsprop as rmsprop, sgd as sgd
from fastxtend.optimizer.kernels import FusedLookahead as FusedLookahead, FusedOptimizer as FusedOptimizer
from fastxtend.optimizer.laprop import LaProp as LaProp, laprop as laprop
from fastxtend.optimizer.lion import Lion as Lion, lion as lion
from fastxtend.optimizer.mars import MARS as MARS, mars as mars
from fastxtend.optimizer.modifiers import cautious as cautious, cautious_decay as cautious_decay, lookahead as lookahead
from fastxtend.optimizer.muon import Muon as Muon, muon as muon
from fastxtend.optimizer.nadam import NAdam as NAdam, nadam as nadam
from fastxtend.optimizer.prodigy import Prodigy as Prodigy, prodigy as prodigy
from fastxtend.optimizer.schedulefree import ScheduleFreeAdam as ScheduleFreeAdam, ScheduleFreeSGD as ScheduleFreeSGD, schedulefree_adam as schedulefree_adam, schedulefree_sgd as schedulefree_sgd
from fastxtend.optimizer.stableadam import StableAdam as StableAdam, stableadam as stableadam
from fastxtend.optimizer.torchscript import JitLookahead as JitLookahead, JitOptimizer as JitOptimizer

__all__ = ['SGD', 'sgd', 'RMSProp', 'rmsprop', 'Adam', 'adam', 'RAdam', 'radam', 'QHAdam', 'qhadam', 'Larc', 'larc', 'Lamb', 'lamb', 'Ranger', 'ranger', 'AdaBelief', 'adabelief', 'Adan', 'adan', 'AdEMAMix', 'ademamix', 'ADOPT', 'adopt', 'LaProp', 'laprop', 'Lion', 'lion', 'MARS', 'mars', 'ScheduleFreeAdam', 'schedulefree_adam', 'ScheduleFreeSGD', 'schedulefree_sgd', 'Muon', 'muon', 'NAdam', 'nadam', 'Prodigy', 'prodigy', 'StableAdam', 'stableadam', 'cautious', 'cautious_decay', 'lookahead', 'FusedOptimizer', 'FusedLookahead', 'JitOptimizer', 'JitLookahead', 'StepperOptimizer', 'StepperLookahead', 'ForEachOptimizer', 'ForEachLookahead', 'SGDForEachOptimizer', 'RMSPropForEachOptimizer', 'AdamForEachOptimizer', 'RAdamForEachOptimizer', 'QHAdamForEachOptimizer', 'LarcForEachOptimizer', 'LambForEachOptimizer', 'RangerForEachOptimizer']

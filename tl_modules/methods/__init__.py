"""Methods: terms that are added to the task's loss."""

from tl_modules.methods.adversarial import ADDA, CDAN, DANN, MCD, MDD, OSBP, PADA
from tl_modules.methods.base import Method
from tl_modules.methods.discrepancy import AFN, CORAL, DAN, JAN, SWD, OptimalTransport
from tl_modules.methods.entropy import BNM, MCC, InfoMax, MinimumEntropy
from tl_modules.methods.generalization import IRM, MLDG, GroupDRO, MixStyle, Mixup, VREx
from tl_modules.methods.normalization import DomainBatchNorm, StochNorm
from tl_modules.methods.regularization import BSS, DELTA, L2SP, CoTuning, LwF
from tl_modules.methods.self_training import SHOT, FixMatch, MeanTeacher, PseudoLabel

__all__ = [
    "ADDA",
    "AFN",
    "BNM",
    "BSS",
    "CDAN",
    "CORAL",
    "DAN",
    "DANN",
    "DELTA",
    "IRM",
    "JAN",
    "L2SP",
    "MCC",
    "MCD",
    "MDD",
    "MLDG",
    "OSBP",
    "PADA",
    "SHOT",
    "SWD",
    "CoTuning",
    "DomainBatchNorm",
    "FixMatch",
    "GroupDRO",
    "InfoMax",
    "LwF",
    "MeanTeacher",
    "Method",
    "MinimumEntropy",
    "MixStyle",
    "Mixup",
    "OptimalTransport",
    "PseudoLabel",
    "StochNorm",
    "VREx",
]

"""Networks of many families keep the contract."""

from __future__ import annotations

import pytest

from arrowhead.features import networks
from arrowhead.features.body_contract import check_backbone

pytestmark = pytest.mark.slow

# name@size, a small size where the network takes one
TIMM_BODIES = [
    "resnet10t@64",
    "resnet18@64",
    "resnet50@64",
    "seresnet50@64",
    "regnety_002@64",
    "tf_efficientnet_lite0@64",
    "efficientnet_b0@64",
    "mnasnet_small@64",
    "fbnetc_100@64",
    "tinynet_e@64",
    "mobilenetv2_035@64",
    "mobilenetv3_small_050@64",
    "hardcorenas_a@64",
    "ghostnetv2_100@64",
    "mobileone_s0@64",
    "convnext_atto@64",
    "edgenext_xx_small@64",
    "densenet121@64",
    "hrnet_w18_small@64",
    "cspresnet50@64",
    "nf_regnet_b0@64",
    "vit_tiny_patch16_224@64",
    "test_vit3",
    "cait_xxs24_224@64",
    "xcit_nano_12_p16_224@64",
    "levit_128s@64",
    "twins_pcpvt_small@64",
    "visformer_tiny@64",
    "efficientvit_b0@64",
    "fastvit_t8@64",
    "hiera_tiny_224@64",
    "volo_d1_224@64",
    "efficientnetv2_rw_t@64",
    "maxvit_rmlp_pico_rw_256@64",
    "resnet26d@64",
    "regnetx_002@64",
]
# name: what is not as it should be, and why
TIMM_EXCEPTIONS = {
    "efficientnetv2_rw_t": "a random network this deep amplifies the rounding of folded weights",
    "maxvit_rmlp_pico_rw_256": "other last bits with one thread than with two",
}
# On CPUs with AMX (Sapphire Rapids), MKL divides the matrix products of these by the number of
# threads; with MKL_CBWR=AVX512,STRICT it does not. On other CPUs they keep the contract.
THREADS_MATTER = {"levit_128s", "twins_pcpvt_small", "efficientvit_b0", "hiera_tiny_224"}
OTHER_BITS_BY_THREADS = "1 threads give other bits than 2."
TORCHVISION_BODIES = [
    "resnet18",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "regnet_y_400mf",
]


@pytest.mark.parametrize("name", TIMM_BODIES)
def test_bodies_of_timm_keep_the_contract(name):
    body, _, size = name.partition("@")
    report = check_backbone(f"timm/{body}", size=int(size) if size else None)
    if body in TIMM_EXCEPTIONS:
        assert report.violations, f"{body} keeps the contract: take it off the list"
    elif body in THREADS_MATTER:
        assert {*report.violations} <= {OTHER_BITS_BY_THREADS}
    else:
        assert report.violations == []


@pytest.mark.parametrize("name", TORCHVISION_BODIES)
def test_bodies_of_torchvision_keep_the_contract(name):
    assert check_backbone(name, size=64).violations == []


def test_every_pooling_is_one_that_a_body_may_be_asked_for():
    assert {*networks.MAP_POOLS, *networks.TOKEN_POOLS} < {*networks.Pool.__args__}

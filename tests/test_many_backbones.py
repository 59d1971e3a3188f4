"""Networks of many families keep the contract.

`make test-slow` checks the small ones of every family; `make bodies` all of them, those of hundreds
of megabytes too.
"""

from __future__ import annotations

import pytest

from arrowhead import ConfigError
from arrowhead.features import networks, torchvision_bodies
from arrowhead.features.body_contract import check_backbone

pytestmark = pytest.mark.slow

SIZE = 64  # pixels: small, but every stage of a network still has some
# name@size where 64 pixels do not do
TIMM_BODIES = """
    resnet10t resnet18 resnet26d ecaresnet26t seresnet50 skresnet18 res2net50d resnest14d
    resnetv2_18 regnetx_002 regnety_002 gernet_s ese_vovnet19b_dw selecsls42 dla34 darknet17
    cs3darknet_s densenet121 hrnet_w18_small hgnetv2_b0 rdnet_tiny repvgg_a0 mobileone_s0
    inception_v3@96 xception41 tf_efficientnet_lite0 efficientnet_b0 efficientnetv2_rw_t
    tinynet_e mixnet_s mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035
    lcnet_050 fbnetc_100 mnasnet_small semnasnet_075 spnasnet_100 hardcorenas_a rexnet_100
    ghostnetv2_100 repghostnet_050 convnext_atto convnextv2_atto inception_next_atto starnet_s1
    fasternet_t0 nf_regnet_b0 edgenext_xx_small poolformer_s12 mambaout_femto resmlp_12_224
    mixer_s32_224 vit_tiny_patch16_224 test_vit3@160 deit_tiny_patch16_224
    deit3_small_patch16_224 eva02_tiny_patch14_224@56 vit_small_patch14_dinov2@56
    vit_small_patch16_dinov3 cait_xxs24_224 xcit_nano_12_p16_224 convit_tiny pit_ti_224
    coat_tiny tiny_vit_5m_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224
    twins_pcpvt_small pvt_v2_b0 mvitv2_tiny hiera_tiny_224 gcvit_xxtiny davit_tiny
    coatnet_nano_rw_224 levit_128s visformer_tiny efficientvit_b0 efficientformerv2_s0
    repvit_m0_9 fastvit_t8 swiftformer_xs shvit_s1 mobilevit_xxs mobilevitv2_050 botnet26t_256
""".split()  # noqa: SIM905 - a hundred names
LARGE_TIMM_BODIES = """
    resnet50 cspresnet50 wide_resnet50_2 vgg11 tresnet_m dm_nfnet_f0 convmixer_768_32
    sequencer2d_s nextvit_small focalnet_tiny_srf tnt_s_legacy_patch16_224 crossvit_tiny_240@240
    volo_d1_224 beit_base_patch16_224 vit_base_patch16_siglip_224 maxvit_rmlp_pico_rw_256
""".split()  # noqa: SIM905 - a hundred names
# Those of torchvision that are small, or the smallest of their kind. The library lists the others.
SMALL_TORCHVISION_BODIES = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_b1 efficientnet_b2
    efficientnet_b3 efficientnet_v2_s googlenet inception_v3 mnasnet0_5 mnasnet0_75 mnasnet1_0
    mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_x_800mf
    regnet_x_1_6gf regnet_x_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf
    resnet18 resnet34 resnet50 resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0
    shufflenet_v2_x1_5 shufflenet_v2_x2_0 swin_t swin_v2_t vit_b_32
""".split()  # noqa: SIM905 - a hundred names
SIZES = {"inception_v3": 96, "vit_h_14": 56, "maxvit_t": 224}

# On CPUs with AMX (Sapphire Rapids), MKL divides the matrix products of these by the number of
# threads or of rows; with MKL_CBWR=AVX512,STRICT it does not. On other CPUs they keep the contract.
PRODUCTS_MATTER = {
    *("alexnet", "mobilenet_v3_large", "swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s"),
    *("swin_v2_b", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "maxvit_t"),
    *("timm/levit_128s", "timm/twins_pcpvt_small", "timm/efficientvit_b0", "timm/hiera_tiny_224"),
    *("timm/swin_tiny_patch4_window7_224", "timm/swinv2_cr_tiny_ns_224", "timm/mvitv2_tiny"),
    *("timm/tiny_vit_5m_224", "timm/pit_ti_224", "timm/mixer_s32_224", "timm/davit_tiny"),
    *("timm/gcvit_xxtiny", "timm/pvt_v2_b0", "timm/beit_base_patch16_224"),
    *("timm/vit_base_patch16_siglip_224", "timm/maxvit_rmlp_pico_rw_256"),
}
OTHER_BITS = ("1 threads give other bits", "2 threads give other bits", "Batches of 16 rows")
# Untrained networks this deep amplify the rounding of folded weights, or leave float16's range.
UNTRAINED_TOO_DEEP = {
    *("efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_m"),
    *("efficientnet_v2_l", "timm/efficientnetv2_rw_t"),
}
NO_LINEAR_LAYER = {"squeezenet1_0", "squeezenet1_1"}  # at their end: they are refused
AMPLIFIED = ("Features are not finite as float16", "library: the cosine")
# One of each family; the export takes longer than all other checks together.
ONNX_BODIES = [
    *("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "densenet121"),
    *("swin_t", "vit_b_32"),
    *("timm/regnety_002", "timm/convnext_atto", "timm/repvgg_a0", "timm/tinynet_e"),
    *("timm/mobilenetv4_conv_small_035", "timm/ghostnetv2_100", "timm/starnet_s1"),
    *("timm/poolformer_s12", "timm/mixer_s32_224", "timm/xcit_nano_12_p16_224", "timm/pvt_v2_b0"),
    *("timm/eva02_tiny_patch14_224@56", "timm/efficientformerv2_s0", "timm/mobilevit_xxs"),
]


def check(name: str, *, onnx: bool = False) -> None:
    body, _, size = name.partition("@")
    report = check_backbone(
        body, size=int(size) if size else SIZES.get(body, SIZE), pools=not onnx, onnx=onnx
    )
    excused = OTHER_BITS * (body in PRODUCTS_MATTER) + AMPLIFIED * (body in UNTRAINED_TOO_DEEP)
    assert [one for one in report.violations if not one.startswith(excused)] == []


@pytest.mark.parametrize("name", TIMM_BODIES)
def test_bodies_of_timm_keep_the_contract(name):
    check(f"timm/{name}")


@pytest.mark.parametrize("name", SMALL_TORCHVISION_BODIES)
def test_bodies_of_torchvision_keep_the_contract(name):
    check(name)


@pytest.mark.bodies
@pytest.mark.parametrize("name", LARGE_TIMM_BODIES)
def test_large_bodies_of_timm_keep_the_contract(name):
    check(f"timm/{name}")


@pytest.mark.bodies
@pytest.mark.parametrize(
    "name",
    sorted(
        {*torchvision_bodies.registered_names()} - {*SMALL_TORCHVISION_BODIES} - NO_LINEAR_LAYER
    ),
)
def test_large_bodies_of_torchvision_keep_the_contract(name):
    check(name)


@pytest.mark.parametrize("name", ONNX_BODIES)
def test_one_body_of_each_family_gives_the_same_features_in_onnx(name):
    pytest.importorskip("onnxruntime")
    check(name, onnx=True)


@pytest.mark.parametrize("name", sorted(NO_LINEAR_LAYER))
def test_bodies_without_a_linear_layer_at_their_end_are_refused(name):
    with pytest.raises(ConfigError, match="no linear layer"):
        check(name)


def test_every_pooling_is_one_that_a_body_may_be_asked_for():
    assert {*networks.MAP_POOLS, *networks.TOKEN_POOLS} < {*networks.Pool.__args__}

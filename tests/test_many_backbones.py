"""About 80 networks of timm and every classification network of torchvision keep the contract."""

from __future__ import annotations

import pytest

from arrowhead import ConfigError
from arrowhead.features import networks, torchvision_bodies
from arrowhead.features.body_contract import check_backbone

pytestmark = pytest.mark.slow

# name@size, a small size where the network takes one
TIMM_BODIES = [
    "resnet10t@64",
    "resnet18@64",
    "resnet26d@64",
    "resnet50@64",
    "seresnet50@64",
    "regnetx_002@64",
    "regnety_002@64",
    "regnetz_005@64",
    "tf_efficientnet_lite0@64",
    "efficientnet_b0@64",
    "efficientnetv2_rw_t@64",
    "mixnet_s@64",
    "mnasnet_small@64",
    "fbnetc_100@64",
    "lcnet_035@64",
    "tinynet_e@64",
    "mobilenetv3_small_050@64",
    "mobilenetv4_conv_small_035@64",
    "mobilenetv2_035@64",
    "hardcorenas_a@64",
    "ghostnet_050@64",
    "ghostnetv2_100@64",
    "mobileone_s0@64",
    "repvgg_a0@64",
    "repvit_m0_9@64",
    "rexnet_100@64",
    "fasternet_t0@64",
    "starnet_s050@64",
    "convnext_atto@64",
    "convnextv2_atto@64",
    "mambaout_femto@64",
    "edgenext_xx_small@64",
    "poolformer_s12@64",
    "caformer_s18@64",
    "densenet121@64",
    "dla34@64",
    "vgg11@64",
    "hrnet_w18_small@64",
    "inception_v3@128",
    "xception41@64",
    "cspresnet50@64",
    "darknet53@64",
    "nf_resnet26@64",
    "nf_regnet_b0@64",
    "selecsls42b@64",
    "ese_vovnet19b_dw@64",
    "vit_tiny_patch16_224@64",
    "vit_small_patch14_dinov2@70",
    "vit_small_patch16_dinov3@64",
    "test_vit3",
    "vit_base_patch16_siglip_224@64",
    "deit_tiny_distilled_patch16_224@64",
    "cait_xxs24_224@64",
    "beit_base_patch16_224@64",
    "eva02_tiny_patch14_224@70",
    "xcit_nano_12_p16_224@64",
    "swin_tiny_patch4_window7_224@112",
    "swinv2_cr_tiny_ns_224@112",
    "maxvit_rmlp_pico_rw_256@64",
    "coat_tiny@64",
    "crossvit_9_240",
    "levit_128s@64",
    "pit_ti_224@64",
    "pvt_v2_b0@64",
    "twins_pcpvt_small@64",
    "nest_tiny@64",
    "convit_tiny@64",
    "visformer_tiny@64",
    "mobilevit_xxs@64",
    "mobilevitv2_050@64",
    "efficientvit_b0@64",
    "efficientvit_m0@64",
    "efficientformerv2_s0@64",
    "fastvit_t8@64",
    "tiny_vit_5m_224@64",
    "gcvit_xxtiny@64",
    "hiera_tiny_224@64",
    "davit_tiny@64",
    "focalnet_tiny_srf@64",
    "volo_d1_224@64",
    "tnt_s_patch16_224@64",
    "mixer_s32_224",
    "gmlp_s16_224",
    "resmlp_12_224@64",
    "sequencer2d_s@64",
]
# name: what is not as it should be, and why
TIMM_EXCEPTIONS: dict[str, str] = {}
TORCHVISION_SIZES = {"inception_v3": 128, "vit": 224, "maxvit": 224, "swin": 64}
TORCHVISION_EXCEPTIONS: dict[str, str] = {}
# Too large to build several times within the minutes that the slow tests have.
TOO_LARGE = {
    "regnet_y_128gf",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
    "regnet_y_32gf",
    "regnet_x_32gf",
    "convnext_large",
    "efficientnet_v2_l",
    "wide_resnet101_2",
    "efficientnet_b7",
    "efficientnet_b6",
}
ONNX_BODIES = ["timm/resnet10t", "timm/convnext_atto", "timm/mobilenetv4_conv_small_035"]
ONNX_BODIES += ["timm/regnetx_002", "timm/efficientnet_b0", "timm/poolformer_s12"]
ONNX_BODIES += ["timm/vit_tiny_patch16_224", "timm/test_vit3", "timm/edgenext_xx_small"]
ONNX_BODIES += ["timm/levit_128s", "timm/vit_small_patch16_dinov3", "timm/fastvit_t8"]


@pytest.mark.parametrize("name", TIMM_BODIES)
def test_bodies_of_timm_keep_the_contract(name):
    body, _, size = name.partition("@")
    report = check_backbone(f"timm/{body}", size=int(size) if size else None)
    if body in TIMM_EXCEPTIONS:
        assert report.violations, f"{body} keeps the contract: take it off the list"
    else:
        assert report.violations == []


@pytest.mark.parametrize("name", sorted({*torchvision_bodies.registered_names()} - TOO_LARGE))
def test_bodies_of_torchvision_keep_the_contract(name):
    size = next((v for k, v in TORCHVISION_SIZES.items() if name.startswith(k)), 64)
    if name in TORCHVISION_EXCEPTIONS:
        try:
            violations = check_backbone(name, size=size).violations
        except ConfigError as error:
            violations = [error.found]
        assert violations, f"{name} keeps the contract: take it off the list"
    else:
        assert check_backbone(name, size=size).violations == []


@pytest.mark.parametrize("name", ONNX_BODIES)
def test_bodies_give_the_same_features_in_onnx(name):
    pytest.importorskip("onnxruntime")
    size = None if name in ("timm/test_vit3", "timm/levit_128s") else 64
    report = check_backbone(name, size=size, pools=False, onnx=True)
    assert [one for one in report.violations if "onnx" in one] == []
    assert report.cosines["onnx"] > 0.9999


def test_every_pooling_is_one_that_a_body_may_be_asked_for():
    assert {*networks.MAP_POOLS, *networks.TOKEN_POOLS} < {*networks.Pool.__args__}

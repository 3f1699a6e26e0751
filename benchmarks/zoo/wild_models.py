"""Models of packages of PyPI, as written in the wild: where each is, its arguments (small sizes), and its inputs.

The inputs are shapes: `2x3x32x32` is noise, `2x16<100` are numbers below 100, and `20x8 e60` are the features of a
graph of 20 nodes with 60 edges.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Make(NamedTuple):
    """`module:name` and its arguments, which may be further parts to make."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def make(path: str, *args: Any, **kwargs: Any) -> Make:
    """A part or a model that is made when it is asked for."""
    return Make(path, args, kwargs)


VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 2, "heads": 4}
VIT |= {"mlp_dim": 64, "dim_head": 8}
CLIP: dict[str, Any] = {"embed_dim": 32, "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 32}}
CLIP["text_cfg"] |= {"heads": 4, "layers": 2}
LM: dict[str, Any] = {"num_tokens": 100, "dim": 32, "depth": 2, "heads": 4}
GRAPH = "20x8 e60"


def _vit(name: str, kind: str = "ViT", shape: str = "2x3x32x32", **changes: Any) -> tuple[Make, str]:
    kwargs = {key: value for key, value in (VIT | changes).items() if value is not None}
    return make(f"vit_pytorch.{name}:{kind}", **kwargs), shape


def _tokens(path: str, **kwargs: Any) -> tuple[Make, str]:
    return make(path, **LM | kwargs), "2x16<100"


def _x(kind: str, **kwargs: Any) -> tuple[Make, str]:
    layers = make(f"x_transformers:{kind}", dim=32, depth=2, heads=4, attn_dim_head=8, **kwargs)
    return make("x_transformers:TransformerWrapper", num_tokens=100, max_seq_len=64, attn_layers=layers), "2x16<100"


def _cv(name: str, shape: str = "2x3x64x64", **kwargs: Any) -> tuple[Make, str]:
    return make("pytorchcv.model_provider:get_model", name, **kwargs), shape


def _smp(kind: str, encoder: str = "resnet18", shape: str = "2x3x64x64") -> tuple[Make, str]:
    return make(f"segmentation_models_pytorch:{kind}", encoder, encoder_weights=None, classes=2), shape


def _monai(kind: str, shape: str = "2x1x32x32", **kwargs: Any) -> tuple[Make, str]:
    return make(f"monai.networks.nets:{kind}", **kwargs), shape


def _graph(kind: str, **kwargs: Any) -> tuple[Make, str]:
    return make(f"torch_geometric.nn.models:{kind}", 8, 16, 2, 4, **kwargs), GRAPH


def _yolo(name: str) -> tuple[Make, str]:
    return make("ultralytics.nn.tasks:DetectionModel", f"{name}.yaml", verbose=False), "2x3x64x64"


FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
BLOCKS: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}

MODELS: dict[str, tuple[Make, str]] = {
    # vit-pytorch
    "vit_pytorch.vit": _vit("vit"),
    "vit_pytorch.simple_vit": _vit("simple_vit", "SimpleViT"),
    "vit_pytorch.simple_flash": _vit("simple_flash_attn_vit", "SimpleViT"),
    "vit_pytorch.registers": _vit("simple_vit_with_register_tokens", "SimpleViT"),
    "vit_pytorch.qk_norm": _vit("simple_vit_with_qk_norm", "SimpleViT"),
    "vit_pytorch.patch_dropout": _vit("simple_vit_with_patch_dropout", "SimpleViT"),
    "vit_pytorch.value_residual": _vit("simple_vit_with_value_residual", "SimpleViT"),
    "vit_pytorch.hyper_connections": _vit("simple_vit_with_hyper_connections", "SimpleViT", num_residual_streams=2),
    "vit_pytorch.fft": _vit("simple_vit_with_fft", "SimpleViT", freq_patch_size=8),
    "vit_pytorch.vit_1d": _vit("vit_1d", "ViT", "2x3x64", image_size=None, seq_len=64),
    "vit_pytorch.simple_1d": _vit("simple_vit_1d", "SimpleViT", "2x3x64", image_size=None, seq_len=64),
    "vit_pytorch.vit_3d": _vit(
        "vit_3d", "ViT", "2x3x8x32x32", patch_size=None, image_patch_size=8, frames=8, frame_patch_size=4
    ),
    "vit_pytorch.simple_3d": _vit(
        "simple_vit_3d", "SimpleViT", "2x3x8x32x32", patch_size=None, image_patch_size=8, frames=8, frame_patch_size=4
    ),
    "vit_pytorch.deepvit": _vit("deepvit", "DeepViT"),
    "vit_pytorch.cait": _vit("cait", "CaiT", cls_depth=1),
    "vit_pytorch.small_data": _vit("vit_for_small_dataset"),
    "vit_pytorch.parallel": _vit("parallel_vit"),
    "vit_pytorch.merger": _vit("vit_with_patch_merger", patch_merge_layer=1, patch_merge_num_tokens=4),
    "vit_pytorch.memory": _vit("learnable_memory_vit"),
    "vit_pytorch.xcit": _vit("xcit", "XCiT", cls_depth=1),
    "vit_pytorch.pit": _vit("pit", "PiT", depth=(1, 1)),
    "vit_pytorch.cct": (
        make("vit_pytorch.cct:CCT", img_size=32, embedding_dim=32, num_layers=2, num_heads=4, mlp_ratio=2.0,
             num_classes=10, positional_embedding="learnable"), "2x3x32x32"),
    "vit_pytorch.levit": (
        make("vit_pytorch.levit:LeViT", image_size=64, num_classes=10, stages=2, dim=(32, 48), depth=1, heads=(2, 3),
             mlp_mult=2, dim_key=8, dim_value=16), "2x3x64x64"),
    "vit_pytorch.cvt": (
        make("vit_pytorch.cvt:CvT", num_classes=10, s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=48, s2_heads=2,
             s3_heads=3, s2_depth=1, s3_depth=1), "2x3x32x32"),
    "vit_pytorch.scalable": (
        make("vit_pytorch.scalable_vit:ScalableViT", num_classes=10, dim=16, heads=(2, 2), depth=(1, 1),
             reduction_factor=(4, 2), window_size=(8, None), ssa_dim_key=8, ssa_dim_value=8, iwsa_dim_key=8,
             iwsa_dim_value=8), "2x3x64x64"),
    "vit_pytorch.sep_vit": (
        make("vit_pytorch.sep_vit:SepViT", num_classes=10, dim=16, dim_head=8, heads=(1, 2), depth=(1, 1),
             window_size=7), "2x3x112x112"),
    "vit_pytorch.max_vit": (
        make("vit_pytorch.max_vit:MaxViT", num_classes=10, dim=16, dim_head=8, depth=(1, 1), window_size=4,
             dim_conv_stem=16), "2x3x64x64"),
    "vit_pytorch.nest": (
        make("vit_pytorch.nest:NesT", image_size=32, patch_size=4, dim=16, heads=2, num_hierarchies=2,
             block_repeats=(1, 1), num_classes=10), "2x3x32x32"),
    "vit_pytorch.mobile_vit": (
        make("vit_pytorch.mobile_vit:MobileViT", image_size=(64, 64), dims=[24, 32, 40],
             channels=[8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 48], num_classes=10, depths=(1, 1, 1)), "2x3x64x64"),
    "vit_pytorch.crossformer": (
        make("vit_pytorch.crossformer:CrossFormer", num_classes=10, dim=(32, 32, 64, 64), depth=(1, 1, 1, 1),
             global_window_size=(2, 2, 1, 1), local_window_size=2), "2x3x64x64"),
    "vit_pytorch.vivit": (
        make("vit_pytorch.vivit:ViViT", image_size=32, frames=4, image_patch_size=8, frame_patch_size=2, num_classes=10,
             dim=32, spatial_depth=1, temporal_depth=1, heads=4, dim_head=8, mlp_dim=64), "2x3x4x32x32"),
    "vit_pytorch.efficient": (
        make("vit_pytorch.efficient:ViT", image_size=32, patch_size=8, num_classes=10, dim=32, transformer=make(
            "nystrom_attention:Nystromformer", dim=32, depth=2, heads=4, dim_head=8, num_landmarks=4)), "2x3x32x32"),
    # x-transformers
    "x_transformers.decoder": _x("Decoder"),
    "x_transformers.encoder": _x("Encoder"),
    "x_transformers.rotary": _x("Decoder", rotary_pos_emb=True),
    "x_transformers.alibi": _x("Decoder", alibi_pos_bias=True),
    "x_transformers.rel_pos": _x("Decoder", rel_pos_bias=True),
    "x_transformers.swiglu": _x("Decoder", ff_glu=True, ff_swish=True, use_rmsnorm=True),
    "x_transformers.scalenorm": _x("Decoder", use_scalenorm=True),
    "x_transformers.qk_norm": _x("Decoder", attn_qk_norm=True),
    "x_transformers.one_kv": _x("Decoder", attn_one_kv_head=True),
    "x_transformers.gqa": _x("Decoder", attn_kv_heads=2),
    "x_transformers.talking": _x("Decoder", attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "x_transformers.sandwich": _x("Decoder", sandwich_norm=True),
    "x_transformers.macaron": _x("Decoder", macaron=True),
    "x_transformers.gate_residual": _x("Decoder", gate_residual=True),
    "x_transformers.memory_kv": _x("Decoder", attn_num_mem_kv=4),
    "x_transformers.flash": _x("Decoder", attn_flash=True),
    "x_transformers.shift": _x("Decoder", shift_tokens=1),
    "x_transformers.vit": (
        make("x_transformers:ViTransformerWrapper", image_size=32, patch_size=8, num_classes=10,
             attn_layers=make("x_transformers:Encoder", dim=32, depth=2, heads=4, attn_dim_head=8)), "2x3x32x32"),
    "x_transformers.continuous": (
        make("x_transformers:ContinuousTransformerWrapper", dim_in=12, dim_out=6, max_seq_len=64,
             attn_layers=make("x_transformers:Encoder", dim=32, depth=2, heads=4, attn_dim_head=8)), "2x16x12"),
    # other transformers
    "performer.lm": _tokens("performer_pytorch:PerformerLM", max_seq_len=64, dim_head=8, causal=False),
    "linformer.lm": _tokens("linformer:LinformerLM", seq_len=16, k=8, dim_head=8),
    "linformer.plain": (make("linformer:Linformer", dim=32, seq_len=16, depth=2, k=8, heads=4), "2x16x32"),
    "linear_attention.lm": _tokens("linear_attention_transformer:LinearAttentionTransformerLM", max_seq_len=64),
    "routing.lm": _tokens(
        "routing_transformer:RoutingTransformerLM", max_seq_len=64, window_size=8, causal=True, dim_head=8),
    "sinkhorn.lm": _tokens("sinkhorn_transformer:SinkhornTransformerLM", max_seq_len=16, bucket_size=8),
    "reformer.lm": _tokens("reformer_pytorch:ReformerLM", max_seq_len=64, bucket_size=4, ff_chunks=1, dim_head=8),
    "nystrom.plain": (
        make("nystrom_attention:Nystromformer", dim=32, depth=2, heads=4, dim_head=8, num_landmarks=4), "2x16x32"),
    "perceiver.image": (
        make("perceiver_pytorch:Perceiver", num_freq_bands=4, depth=2, max_freq=8.0, num_latents=8, latent_dim=32,
             latent_heads=4, cross_dim_head=8, latent_dim_head=8, num_classes=10), "2x16x16x3"),
    "perceiver.lm": (
        make("perceiver_pytorch:PerceiverLM", dim=32, num_tokens=100, max_seq_len=64, depth=2,
             num_latents=8, latent_dim=32, latent_heads=4, latent_dim_head=8, cross_dim_head=8),
        "2x16<100"),
    "conformer.plain": (make("conformer:Conformer", dim=32, depth=2, dim_head=8, heads=4, conv_kernel_size=7),
                        "2x16x32"),
    "timesformer.video": (
        make("timesformer_pytorch:TimeSformer", dim=32, num_frames=4, num_classes=10, image_size=32, patch_size=8,
             depth=2, heads=4, dim_head=8), "2x4x3x32x32"),
    "gateloop.lm": _tokens("gateloop_transformer:Transformer", dim_head=8, use_gate_looped_attn=False),
    "rmt.lm": _tokens("recurrent_memory_transformer_pytorch:RecurrentMemoryTransformer", num_memory_tokens=4,
                      seq_len=16, dim_head=8),
    "megabyte.lm": (make("MEGABYTE_pytorch:MEGABYTE", num_tokens=100, dim=(32, 16), depth=(1, 1), max_seq_len=(8, 4),
                         dim_head=8, heads=4), "2x32<100"),
    "hierarchical.lm": _tokens("simple_hierarchical_transformer:HierarchicalTransformer", seq_len=64, dim_head=8),
    "itransformer.plain": (make("iTransformer:iTransformer", num_variates=6, lookback_len=16, depth=2, dim=32,
                                pred_length=4, dim_head=8, heads=4), "2x16x6"),
    "axial.image": (make("axial_attention:AxialImageTransformer", dim=16, depth=2, heads=4, reversible=False),
                    "2x16x8x8"),
    "soft_moe.layer": (make("soft_moe_pytorch:SoftMoE", dim=32, seq_len=16, num_experts=4), "2x16x32"),
    # mixers and attention blocks
    "mlp_mixer.image": (make("mlp_mixer_pytorch:MLPMixer", image_size=32, channels=3, patch_size=8, dim=32, depth=2,
                             num_classes=10), "2x3x32x32"),
    "res_mlp.image": (make("res_mlp_pytorch:ResMLP", image_size=32, patch_size=8, dim=32, depth=2, num_classes=10),
                      "2x3x32x32"),
    "g_mlp.lm": (make("g_mlp_pytorch:gMLP", num_tokens=100, dim=32, depth=2, seq_len=16), "2x16<100"),
    "g_mlp.image": (make("g_mlp_pytorch:gMLPVision", image_size=32, patch_size=8, num_classes=10, dim=32, depth=2),
                    "2x3x32x32"),
    "lambda.layer": (make("lambda_networks:LambdaLayer", dim=16, dim_out=16, r=5, dim_k=8, heads=4), "2x16x8x8"),
    "botnet.stack": (make("bottleneck_transformer_pytorch:BottleStack", dim=32, fmap_size=8, dim_out=64, heads=4,
                          dim_head=8, num_layers=2, downsample=True), "2x32x8x8"),
    "halo.layer": (make("halonet_pytorch:HaloAttention", dim=32, block_size=4, halo_size=2, dim_head=8, heads=4),
                   "2x32x8x8"),
    # tables and series
    "tabnet.plain": (make("pytorch_tabnet.tab_network:TabNetNoEmbeddings", 12, 3), "8x12"),
    "tab.transformer": (make("tab_transformer_pytorch:TabTransformer", categories=(5, 6, 7), num_continuous=4, dim=16,
                             depth=2, heads=4, dim_head=8, mlp_act=make("torch.nn:ReLU")), "4x3<5 4x4"),
    "tab.ft": (make("tab_transformer_pytorch:FTTransformer", categories=(5, 6, 7), num_continuous=4, dim=16, depth=2,
                    heads=4, dim_head=8), "4x3<5 4x4"),
    "rtdl.mlp": (make("rtdl_revisiting_models:MLP", d_in=12, d_out=3, n_blocks=2, d_block=32, dropout=0.1), "4x12"),
    "rtdl.resnet": (make("rtdl_revisiting_models:ResNet", d_in=12, d_out=3, n_blocks=2, d_block=32, d_hidden=None,
                         d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.1), "4x12"),
    "rtdl.ft": (make("rtdl_revisiting_models:FTTransformer", n_cont_features=6, cat_cardinalities=[5, 6], d_out=3,
                     n_blocks=2, d_block=32, attention_n_heads=4, attention_dropout=0.1,
                     ffn_d_hidden_multiplier=2.0, ffn_dropout=0.1, residual_dropout=0.0), "4x6 4x2<5"),
    "tabm.plain": (make("tabm:TabM.make", n_num_features=12, d_out=3, k=4, n_blocks=2, d_block=32), "4x12"),
    "tcn.plain": (make("pytorch_tcn:TCN", 8, [16, 16, 16]), "2x8x32"),
    # diffusion and sound
    "diffusion.unet": (make("denoising_diffusion_pytorch:Unet", dim=16, dim_mults=(1, 2), attn_dim_head=8,
                            flash_attn=False), "2x3x16x16 2<9"),
    "diffusion.unet_1d": (make("denoising_diffusion_pytorch:Unet1D", dim=16, dim_mults=(1, 2), channels=3,
                               attn_dim_head=8), "2x3x32 2<9"),
    "diffusion.karras": (make("denoising_diffusion_pytorch:KarrasUnet", image_size=16, dim=16, dim_max=32, channels=3,
                              num_downsamples=1, num_blocks_per_stage=1, attn_dim_head=8), "2x3x16x16 2"),
    "diffusion.uvit": (make("denoising_diffusion_pytorch.simple_diffusion:UViT", dim=16, dim_mults=(1, 2), vit_depth=1,
                            attn_dim_head=8), "2x3x32x32 2"),
    "x_unet.plain": (make("x_unet:XUnet", dim=16, channels=3, dim_mults=(1, 2), num_blocks_per_stage=(1, 1),
                          num_self_attn_per_stage=(0, 1), nested_unet_depths=(0, 0)), "2x3x32x32"),
    "vq.plain": (make("vector_quantize_pytorch:VectorQuantize", dim=16, codebook_size=32, codebook_dim=8), "2x8x16"),
    # flows
    "nflows.made": (make("nflows.transforms.made:MADE", features=8, hidden_features=32, num_blocks=2), "4x8"),
    "nflows.resnet": (make("nflows.nn.nets:ResidualNet", in_features=8, out_features=4, hidden_features=32), "4x8"),
    "nflows.conv": (make("nflows.nn.nets:ConvResidualNet", in_channels=3, out_channels=4, hidden_channels=16),
                    "2x3x8x8"),
    # convolutional networks
    "efficientnet_pytorch.b0": (make("efficientnet_pytorch:EfficientNet.from_name", "efficientnet-b0"), "2x3x64x64"),
    "resnest.50": (make("resnest.torch:resnest50"), "2x3x64x64"),
    "pretrainedmodels.polynet": (make("pretrainedmodels:xception", pretrained=None), "2x3x96x96"),
    "pretrainedmodels.dpn68": (make("pretrainedmodels:dpn68", pretrained=None), "2x3x224x224"),
    "pretrainedmodels.se_resnet50": (make("pretrainedmodels:se_resnet50", pretrained=None), "2x3x224x224"),
    "lightly.resnet": (make("lightly.models:ResNetGenerator", "resnet-9", width=0.25), "2x3x32x32"),
    "kornia.hardnet": (make("kornia.feature:HardNet", pretrained=False), "2x1x32x32"),
    "kornia.sosnet": (make("kornia.feature:SOSNet", pretrained=False), "2x1x32x32"),
    "kornia.hynet": (make("kornia.feature:HyNet", pretrained=False), "2x1x32x32"),
    "kornia.tiny_vit": (make("kornia.models.tiny_vit:TinyViT", img_size=64, num_classes=10, embed_dims=[16, 32, 32, 48],
                             depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 3), window_sizes=(4, 4, 4, 2)), "2x3x64x64"),
    **{f"pytorchcv.{name}": _cv(name, "1x3x224x224") for name in (
        "mobilenet_wd4", "shufflenet_g1_wd4", "menet108_8x1_g3", "igcv3_wd4", "ghostnet", "hardnet39ds",
        "preresnet18_wd4", "dicenet_wd5")},
    **{f"pytorchcv.{name}": _cv(name, "2x3x32x32") for name in (
        "nin_cifar10", "resnet20_cifar10", "wrn16_10_cifar10", "pyramidnet110_a48_cifar10", "densenet40_k12_cifar10",
        "ror3_56_cifar10", "shakeshakeresnet20_2x16d_cifar10", "diaresnet20_cifar10")},
    # segmentation and medicine
    **{f"smp.{kind}": _smp(kind) for kind in (
        "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "UPerNet", "Segformer")},
    "smp.PAN": _smp("PAN", shape="2x3x128x128"),
    "smp.Unet_mobilenet": _smp("Unet", "mobilenet_v2"),
    "smp.Unet_mit": _smp("Unet", "mit_b0"),
    "monai.UNet": _monai("UNet", **FLAT, **BLOCKS, num_res_units=2),
    "monai.AttentionUnet": _monai("AttentionUnet", **FLAT, **BLOCKS),
    "monai.BasicUNet": _monai("BasicUNet", **FLAT, features=(8, 8, 16, 16, 32, 8)),
    "monai.BasicUNetPlusPlus": _monai("BasicUNetPlusPlus", **FLAT, features=(8, 8, 16, 16, 32, 8)),
    "monai.SegResNet": _monai("SegResNet", **FLAT, init_filters=8),
    "monai.VNet": _monai("VNet", spatial_dims=2, in_channels=1, out_channels=2),
    "monai.UNETR": _monai("UNETR", **FLAT, img_size=32, feature_size=8, hidden_size=32, mlp_dim=64, num_heads=4),
    "monai.SwinUNETR": _monai("SwinUNETR", "2x1x64x64", **FLAT, feature_size=12, depths=(1, 1, 1, 1),
                              num_heads=(2, 2, 2, 2), window_size=4),
    "monai.ViT": _monai("ViT", in_channels=1, img_size=32, patch_size=8, hidden_size=32, mlp_dim=64, num_layers=2,
                        num_heads=4, spatial_dims=2, classification=True),
    "monai.DynUNet": _monai("DynUNet", **FLAT, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2),
                            filters=(8, 16, 32)),
    "monai.AutoEncoder": _monai("AutoEncoder", **FLAT, channels=(8, 16, 32), strides=(2, 2, 2)),
    "monai.DenseNet121": _monai("DenseNet121", "2x1x64x64", **FLAT),
    "monai.HighResNet": _monai("HighResNet", **FLAT),
    "monai.DiffusionModelUNet": _monai(
        "DiffusionModelUNet", "2x1x16x16 2<9", **FLAT, channels=(8, 16), attention_levels=(False, True),
        num_res_blocks=1, num_head_channels=8, norm_num_groups=4),
    "monai.AutoencoderKL": _monai(
        "AutoencoderKL", "2x1x16x16", **FLAT, channels=(8, 16), attention_levels=(False, False), latent_channels=3,
        num_res_blocks=(1, 1), norm_num_groups=4),
    "monai.VQVAE": _monai("VQVAE", "2x1x32x32", **FLAT, channels=(8, 16), num_res_channels=(8, 16), num_res_layers=1,
                          downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
                          upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)), num_embeddings=16, embedding_dim=8),
    "monai.Restormer": _monai("restormer.Restormer", "2x1x32x32", spatial_dims=2, in_channels=1, out_channels=1, dim=8,
                              num_blocks=(1, 1, 1, 1), heads=(1, 1, 2, 2), num_refinement_blocks=1),
    "monai.MedNeXt": _monai("MedNeXt", **FLAT, init_filters=8),
    # detection
    **{f"ultralytics.{name}": _yolo(name) for name in ("yolov3-tiny", "yolov5n", "yolov8n", "yolov9t", "yolov10n",
                                                       "yolo11n", "yolo12n")},
    # graphs
    **{f"pyg.{kind}": _graph(kind) for kind in ("GCN", "GraphSAGE", "GAT", "GIN", "EdgeCNN", "PMLP")},
    "pyg.GATv2": _graph("GAT", v2=True, heads=2),
    "pyg.MLP": (make("torch_geometric.nn.models:MLP", [8, 16, 4]), "20x8"),
    # contrastive
    "open_clip.vit": (make("open_clip.model:CLIP", **CLIP, vision_cfg={
        "image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}), "2x3x32x32 2x16<100"),
    "open_clip.resnet": (make("open_clip.model:CLIP", **CLIP, vision_cfg={
        "image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}), "2x3x64x64 2x16<100"),
}  # fmt: skip

"""Data of the Hugging Face suite: which types, and the small sizes of each; `hub.py` says how they are used."""

from __future__ import annotations

from typing import Any

BATCH, WORDS, TARGETS, FIRST_WORD, VOCABULARY = 2, 11, 7, 20, 101

# Group: the type names.
GROUPS: dict[str, str] = {
    "encoder": """
        albert bert bert-generation big_bird bros camembert canine convbert data2vec-text deberta deberta-v2
        distilbert electra ernie esm eurobert flaubert fnet funnel ibert jina_embeddings_v3 layoutlm layoutlmv3 lilt
        longformer luke markuplm megatron-bert mobilebert modernbert mpnet mra nomic_bert nystromformer perceiver
        rembert roberta roberta-prelayernorm roc_bert roformer splinter squeezebert tapas xlm xlm-roberta
        xlm-roberta-xl xlnet xmod yoso
    """,
    "decoder": """
        apertus arcee biogpt bitnet bloom codegen cohere cohere2 cpmant ctrl cwm diffllama doge ernie4_5 exaone4
        falcon gemma gemma2 gemma3_text gemma3n_text glm glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
        gpt_neox_japanese gptj granite helium hunyuan_v1_dense imagegpt jais2 llama ministral ministral3 mistral
        modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 qwen2 qwen3
        seed_oss smollm3 stablelm starcoder2 vaultgemma xglm youtu reformer
    """,
    "experts": """
        afmoe dbrx deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe granitemoeshared
        hunyuan_v1_moe jetmoe llama4_text longcat_flash minimax minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe
        nllb-moe switch_transformers
    """,
    "recurrent": """
        bamba falcon_h1 falcon_mamba granitemoehybrid jamba lfm2 lfm2_moe mamba mamba2 nemotron_h olmo_hybrid
        qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba zamba2
    """,
    "seq2seq": """
        bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp pegasus
        pegasus_x plbart prophetnet t5 t5gemma umt5
    """,
    "audio": """
        audio-spectrogram-transformer clap dac data2vec-audio encodec fastspeech2_conformer hubert mimi moonshine
        parakeet_ctc sew sew-d speech_to_text speecht5 unispeech unispeech-sat wav2vec2 wav2vec2-bert
        wav2vec2-conformer wavlm whisper
    """,
    "vision": """
        beit bit convnext convnextv2 cvt data2vec-vision deit dinov2 dinov2_with_registers dinov3_convnext
        dinov3_vit efficientnet focalnet hgnet_v2 hiera ijepa levit mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2
        pixio poolformer pvt pvt_v2 regnet resnet swiftformer swin swin2sr swinv2 textnet vit vit_mae vit_msn vitdet
        timesformer videomae vivit vjepa2
    """,
    "dense": """
        conditional_detr d_fine dab-detr deformable_detr depth_anything detr dpt eomt glpn mask2former maskformer
        prompt_depth_anything rt_detr rt_detr_v2 sam sam_hq segformer seggpt superpoint table-transformer upernet
        vitmatte vitpose yolos zoedepth
    """,
    "multimodal": """
        altclip aya_vision blip blip-2 bridgetower chinese_clip clip clipseg flava florence2 gemma3 git got_ocr2
        groupvit idefics2 idefics3 instructblip internvl janus kosmos-2 llava llava_next llava_onevision lxmert
        metaclip_2 mgp-str mistral3 owlv2 owlvit paligemma pix2struct qwen2_5_vl qwen2_vl qwen3_vl siglip siglip2
        smolvlm trocr udop vipllava visual_bert xclip
    """,
    "series": """
        autoformer decision_transformer informer patchtsmixer patchtst time_series_transformer
    """,
}

# Group: the tasks of transformers' own tables, the first that has the type; else the bare model.
TASKS: dict[str, str] = {
    "encoder": "MASKED_LM",
    "decoder": "CAUSAL_LM",
    "experts": "SEQ_TO_SEQ_CAUSAL_LM CAUSAL_LM",
    "recurrent": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "audio": "CTC SPEECH_SEQ_2_SEQ AUDIO_CLASSIFICATION",
    "vision": "IMAGE_CLASSIFICATION VIDEO_CLASSIFICATION",
    "dense": """
        SEMANTIC_SEGMENTATION DEPTH_ESTIMATION OBJECT_DETECTION UNIVERSAL_SEGMENTATION IMAGE_MATTING POSE_ESTIMATION
    """,
    "multimodal": "IMAGE_TEXT_TO_TEXT ZERO_SHOT_OBJECT_DETECTION",
    "series": "TIME_SERIES_PREDICTION",
}

# The small size: the fields that get it.
_NAMES: dict[int, str] = {
    1: "n_group topk_group num_expert_groups n_shared_experts num_shared_experts first_k_dense_replace",
    2: """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers num_self_attends_per_block l_layers x_layers r_layers num_key_value_heads
        encoder_num_key_value_heads decoder_num_key_value_heads num_experts_per_tok moe_top_k moe_k
        num_experts_per_token depth linear_num_key_heads
    """,
    4: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads kv_n_heads num_experts num_local_experts
        n_routed_experts moe_num_experts num_routed_experts qk_rope_head_dim rotary_dim
        num_conv_pos_embedding_groups num_groups groups_width linear_num_value_heads
    """,
    5: "time_step_rank mamba_dt_rank sliding_window attention_window_size local_attention window",
    6: "num_queries num_query_tokens num_latents",
    8: "qk_nope_head_dim state_size mamba_d_state ssm_state_size patch_size",
    12: "head_dim d_kv attention_head_dim v_head_dim d_head linear_key_head_dim linear_value_head_dim",
    16: "embedding_size stem_channels num_conv_pos_embeddings",
    20: "q_lora_rank num_mel_bins",
    24: "kv_lora_rank",
    32: "image_size input_size",
    48: "hidden_size d_model n_embd emb_dim embed_dim word_embed_proj_dim dim projection_dim embedding_dim",
    56: "moe_intermediate_size expert_ffn_dim expert_ffn_hidden_size",
    64: """
        max_position_embeddings n_positions n_ctx max_seq_len seq_length max_2d_position_embeddings
        max_source_positions max_target_positions max_sequence_length max_encoder_position_embeddings
        max_decoder_position_embeddings
    """,
    72: "shared_expert_intermediate_size moe_shared_expert_intermediate_size intermediate_size_mlp",
    80: """
        intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim d_ff d_inner ffn_hidden_size
        dim_feedforward dff feed_forward_size shared_intermediate_size block_ff_dim feedforward_dim hidden_dim
    """,
    VOCABULARY: "vocab_size",
}
SIZES: dict[str, int] = {name: size for size, named in _NAMES.items() for name in named.split()}
SIZES |= dict.fromkeys(["use_cache", "use_mambapy", "is_training"], False)

# Where the default is a list: its new items, repeated or cut to its length.
_LIST_NAMES: dict[tuple[int, ...], str] = {
    (16, 24, 32, 48): "hidden_sizes embed_dims encoder_hidden_size neck_hidden_sizes embed_dim hidden_size",
    (1, 2, 1, 1): "depths num_encoder_blocks_depths layers depth",
    (2, 2, 2, 4): "num_heads num_attention_heads",
    (16,): "conv_dim tdnn_dim",
    (2, 2, 1, 1): "sr_ratios",
}
LISTS = {name: sizes for sizes, named in _LIST_NAMES.items() for name in named.split()}

# A token's number, by the beginning of its name; others get 9.
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 3, "mask": 4, "sep": 5, "image": 7, "video": 8}

_STAGES = {"image_size": 64, "patch_size": 4}
_RESNET = {"model_type": "resnet", "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}
_LAST = {**_RESNET, "out_features": ["stage4"]}
_FOUR_LAYERS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
_DEPTH = {
    "backbone_config": _FOUR_LAYERS,
    "fusion_hidden_size": 20,
    "head_hidden_size": 12,
    "reassemble_hidden_size": 48,
}
_SWIN = {**_STAGES, "window_size": 2, "embed_dim": 16}
_EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": 64}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SERIES = {
    "prediction_length": 5,
    "context_length": 9,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 1,
    "input_size": 1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2]}}
_SAM = {
    "vision_config": {
        "output_channels": 48,
        "image_size": 64,
        "global_attn_indexes": [1],
        "window_size": 2,
        "mlp_dim": 80,
        "num_pos_feats": 24,
    },
    "prompt_encoder_config": {"image_size": 64, "image_embedding_size": 8, "mask_input_channels": 16},
    "mask_decoder_config": {"mlp_dim": 80, "iou_head_hidden_dim": 32, "vit_dim": 48},
}
_RT_DETR = {
    "encoder_in_channels": [24, 32, 48],
    "encoder_hidden_dim": 48,
    "decoder_in_channels": [48, 48, 48],
    "encoder_layers": 1,
    "num_denoising": 0,
}
_HGNET = {
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 24, 32, 48],
    "stage_mid_channels": [8, 8, 12, 16],
    "stage_out_channels": [24, 32, 48, 64],
    "hidden_sizes": [24, 32, 48, 64],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
}

# Type: values for its configuration, a part's inside a dict of its own.
CHANGES: dict[str, dict[str, Any]] = {
    "bros": {"hidden_size": 64},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 8},
    "longformer": {"attention_window": [4, 4]},
    "luke": {"entity_vocab_size": 51, "entity_emb_size": 24},
    "perceiver": {"d_latents": 40, "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
    "roc_bert": {
        "pronunciation_vocab_size": 31,
        "shape_vocab_size": 41,
        "shape_embed_dim": 20,
        "pronunciation_embed_dim": 28,
    },
    "squeezebert": {"embedding_size": 48},
    "xmod": {"default_language": "en_XX"},
    "cpmant": {"dim_ff": 80, "prompt_length": 8, "prompt_types": 4, "segment_types": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "activation_sparsity_pattern": [0.5, 0.0],
        "intermediate_size": [80, 80],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 12},
    "ministral": {"head_dim": 12},
    "nemotron": {"head_dim": 12, "num_key_value_heads": 2},
    "stablelm": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "youtu": {"head_dim": 4},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 12,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"head_dim": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"head_dim": 12},
    "longcat_flash": {"head_dim": 4},
    "minimax": _LINEAR,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "olmo_hybrid": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {
        "layer_types": ["mamba", "hybrid"],
        "mamba_headdim": 12,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
    },
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "led": {"attention_window": [4, 4]},
    "audio-spectrogram-transformer": {"max_length": 40},
    "clap": {
        "audio_config": {
            "spec_size": 64,
            "num_mel_bins": 32,
            "window_size": 2,
            "patch_size": 4,
            "hidden_size": 128,
            "patch_embeds_hidden_size": 16,
        },
    },
    "dac": {
        "encoder_hidden_size": 8,
        "decoder_hidden_size": 64,
        "hidden_size": 128,
        "n_codebooks": 3,
        "codebook_size": 32,
    },
    "encodec": {"num_filters": 8, "codebook_dim": 48},
    "fastspeech2_conformer": {
        "encoder_linear_units": 80,
        "decoder_linear_units": 80,
        "duration_predictor_channels": 16,
        "pitch_predictor_channels": 16,
        "energy_predictor_channels": 16,
        "speech_decoder_postnet_units": 24,
    },
    "mimi": {
        "num_filters": 8,
        "codebook_dim": 24,
        "vector_quantization_hidden_dimension": 24,
        "upsample_groups": 48,
        "num_quantizers": 4,
        "codebook_size": 32,
    },
    "moonshine": {
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
    },
    "parakeet_ctc": {"encoder_config": {"num_mel_bins": 32, "subsampling_conv_channels": 16}},
    "speech_to_text": {"input_feat_per_channel": 20, "conv_channels": 24},
    "wav2vec2-bert": {"vocab_size": VOCABULARY, "feature_projection_input_dim": 20},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "dinov3_convnext": _STAGES,
    "cvt": {"depth": [1, 2, 3]},
    "efficientnet": _EFFICIENT,
    "focalnet": {**_STAGES, "embed_dim": 16},
    "hgnet_v2": _HGNET,
    "hiera": {"image_size": [64, 64]},
    "levit": {"image_size": 64, "patch_size": 16},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.35, "image_size": 64},
    "mobilevit": {"image_size": 64, "patch_size": 2},
    "mobilevitv2": {"image_size": 64, "patch_size": 2, "width_multiplier": 0.25},
    "swin": _SWIN,
    "swin2sr": {"image_size": 16, "patch_size": 1, "window_size": 4},
    "swinv2": {**_SWIN, "window_size": 4},
    "textnet": {"stem_out_channels": 16, "image_size": 64},
    "timesformer": {"num_frames": 4},
    "videomae": {"num_frames": 4},
    "vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "vjepa2": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": 48,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2,
    },
    "conditional_detr": {"backbone_config": _LAST},
    "dab-detr": {"backbone_config": _LAST},
    "deformable_detr": {"backbone_config": _RESNET, "d_model": 64},
    "detr": {"backbone_config": _LAST},
    "table-transformer": {"backbone_config": _LAST},
    "d_fine": {**_RT_DETR, "encoder_in_channels": [32, 48, 64], "backbone_config": _HGNET},
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "depth_anything": _DEPTH,
    "prompt_depth_anything": _DEPTH,
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "fusion_hidden_size": 24},
    "eomt": {"num_blocks": 1},
    "mask2former": {"backbone_config": _SWIN, "hidden_dim": 64, "feature_size": 64, "mask_feature_size": 64},
    "maskformer": {"backbone_config": _SWIN, "fpn_feature_size": 64, "mask_feature_size": 64},
    "sam": _SAM,
    "sam_hq": _SAM,
    "seggpt": {
        "image_size": [64, 32],
        "pretrain_image_size": 32,
        "decoder_hidden_size": 16,
        "num_hidden_layers": 3,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1, 2],
        "mlp_dim": 80,
    },
    "superpoint": {"encoder_hidden_sizes": [16, 16, 24, 24], "decoder_hidden_size": 32, "descriptor_decoder_dim": 32},
    "upernet": {"auxiliary_channels": 24},
    "vitmatte": {
        "backbone_config": {"image_size": 64, "patch_size": 16, "num_channels": 4, "out_features": ["stage2"]},
        "fusion_hidden_sizes": [32, 24, 16, 12],
        "convstream_hidden_sizes": [12, 16, 24],
    },
    "vitpose": {"backbone_config": {"image_size": [64, 48], "num_experts": 1, "part_features": 8, "out_indices": [2]}},
    "yolos": {"image_size": [32, 48]},
    "zoedepth": {
        "backbone_config": _FOUR_LAYERS,
        "fusion_hidden_size": 20,
        "bottleneck_features": 20,
        "num_relative_features": 8,
        "bin_embedding_dim": 12,
        "patch_transformer_hidden_size": 16,
    },
    "blip-2": {"image_token_index": TOKENS["image"]},
    "bridgetower": {"hidden_size": 64, "vision_config": {"hidden_size": 64}, "text_config": {"hidden_size": 64}},
    "florence2": {
        "vision_config": {
            "embed_dim": [16, 16, 32, 32],
            "num_groups": [2, 2, 4, 4],
            "depths": [1, 1, 1, 1],
            "window_size": 4,
        },
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "idefics2": {"perceiver_config": {"resampler_n_latents": 6, "resampler_n_heads": 4, "resampler_head_dim": 12}},
    "instructblip": {"image_token_index": TOKENS["image"]},
    "internvl": {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
    "janus": {
        "vq_config": {
            "base_channels": 32,
            "latent_channels": 32,
            "num_res_blocks": 1,
            "num_embeddings": 64,
            "channel_multiplier": [1, 1],
        },
    },
    "kosmos-2": {"text_config": {"attention_heads": 4, "layers": 2}, "latent_query_num": 6},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "lxmert": {"visual_feat_dim": 40},
    "mgp-str": {"num_bpe_labels": 89, "num_wordpiece_labels": 97},
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 40}},
    "qwen2_vl": {"text_config": _MROPE},
    "qwen2_5_vl": {
        "text_config": _MROPE,
        "vision_config": {"out_hidden_size": 48, "fullatt_block_indexes": [1], "window_size": 32},
    },
    "qwen3_vl": {
        "text_config": _MROPE,
        "vision_config": {"out_hidden_size": 48, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    },
    "siglip2": {"vision_config": {"num_patches": 16}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xclip": {
        "vision_config": {
            "num_frames": 4,
            "mit_hidden_size": 48,
            "mit_num_attention_heads": 4,
            "mit_intermediate_size": 80,
        }
    },
    "autoformer": {**_SERIES, "label_length": 4},
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "patchtsmixer": {"context_length": 32, "num_input_channels": 3, "prediction_length": 5},
    "patchtst": {
        "context_length": 32,
        "patch_length": 4,
        "patch_stride": 4,
        "num_input_channels": 3,
        "prediction_length": 5,
    },
}

# Type: the class, where the group's tasks name none or the wrong one.
CLASSES: dict[str, str] = {
    "superpoint": "SuperPointForKeypointDetection",
    "swin2sr": "Swin2SRForImageSuperResolution",
    "trocr": "TrOCRForCausalLM",
}

_VIDEO = "pixel_values=2x4x3x32x32"
_GRID = "input_ids pixel_values=32x384 image_grid_thw mm_token_type_ids"
_PAST = "past_values=2x12 past_time_features=2x12x1 past_observed_mask future_values=2x5 future_time_features=2x5x1"

# Type: the names of the inputs, where the usual ones are not enough; `name=2x3` asks for noise of that shape.
INPUTS: dict[str, str] = {
    "bros": "input_ids bbox attention_mask",
    "perceiver": "inputs attention_mask",
    "t5gemma": "input_ids decoder_input_ids attention_mask use_cache",
    "audio-spectrogram-transformer": "input_values=2x40x20",
    "clap": "input_ids input_features=2x1x100x32",
    "dac": "input_values=2x1x2048",
    "encodec": "input_values=2x1x2048",
    "mimi": "input_values=2x1x3840",
    "whisper": "input_features=2x20x128 decoder_input_ids",
    "timesformer": _VIDEO,
    "videomae": _VIDEO,
    "vivit": _VIDEO,
    "vjepa2": "pixel_values_videos=2x4x3x32x32",
    "vit_mae": "pixel_values noise=2x16",
    "sam": "pixel_values input_points=2x1x2x2",
    "sam_hq": "pixel_values input_points=2x1x2x2",
    "seggpt": "pixel_values=2x3x32x32 prompt_pixel_values=2x3x32x32 prompt_masks=2x3x32x32",
    "vitmatte": "pixel_values=2x4x64x64",
    "idefics2": "input_ids pixel_values=2x1x3x32x32",
    "idefics3": "input_ids pixel_values=2x1x3x32x32",
    "smolvlm": "input_ids pixel_values=2x1x3x32x32",
    "instructblip": "input_ids pixel_values qformer_input_ids",
    "kosmos-2": "input_ids pixel_values image_embeds_position_mask",
    "llava_next": "input_ids pixel_values=2x2x3x32x32 image_sizes",
    "llava_onevision": "input_ids pixel_values=2x2x3x32x32 image_sizes",
    "lxmert": "input_ids visual_feats=2x5x40 visual_pos=2x5x4",
    "mistral3": "input_ids pixel_values image_sizes",
    "pix2struct": "flattened_patches decoder_input_ids",
    "qwen2_vl": _GRID,
    "qwen2_5_vl": _GRID,
    "qwen3_vl": _GRID,
    "siglip2": "input_ids pixel_values=2x16x192 pixel_attention_mask spatial_shapes",
    "udop": "input_ids attention_mask bbox pixel_values decoder_input_ids",
    "xclip": f"input_ids {_VIDEO}",
    "autoformer": _PAST,
    "informer": _PAST,
    "time_series_transformer": _PAST,
    "decision_transformer": "states=2x7x17 actions=2x7x4 rewards=2x7x1 returns_to_go=2x7x1 timesteps",
    "patchtsmixer": "past_values=2x32x3",
    "patchtst": "past_values=2x32x3",
}

# Type: how many of the words stand for the image.
IMAGE_WORDS: dict[str, int] = {
    **dict.fromkeys("aya_vision gemma3 idefics3 internvl mistral3 qwen2_vl qwen2_5_vl qwen3_vl smolvlm".split(), 4),
    **dict.fromkeys("blip-2 idefics2 instructblip kosmos-2".split(), 6),
    **dict.fromkeys("janus llava paligemma vipllava".split(), 16),
    **dict.fromkeys("llava_next llava_onevision".split(), 36),
    "got_ocr2": 1,
    "florence2": 5,
}

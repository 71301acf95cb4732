"""Options that do not change what a Step-3.5 model computes, by reason: for `tools/options.py`.

A name belongs here after somebody has looked up in Megatron-Core what it does. One that changes
what a layer computes belongs in `step35_patch.model.refused_options` or
`step35_patch.model.named_options` instead. Arguments of groups that no model reads (logging,
checkpointing, ...) are decided by their group.
"""

# Reason: names, separated by white space.
_NAMES = {
    "layout: where layers, weights and tokens are": """
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        context_parallel_size expert_gtp_weight_remat_size expert_model_parallel_size
        expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size gtp_weight_remat_size
        hetereogenous_dist_checkpoint hierarchical_context_parallel_sizes hybrid_context_parallel
        max_seqlen_per_dp_cp_rank microbatch_group_size_per_vp_stage mtp_standalone
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        pipeline_model_parallel_layout pipeline_model_parallel_size sequence_parallel
        tensor_model_parallel_size tensor_parallel_num_weight_shards variable_seq_lengths
        virtual_pipeline_model_parallel_size
    """,
    "communication: how and when it is sent": """
        batch_p2p_comm batch_p2p_sync cp_comm_type delay_wgrad_compute
        ep_overlap_early_attn_memory_release gradient_accumulation_fusion
        high_priority_a2a_comm_stream moe_deepep_num_sms moe_enable_deepep
        moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms
        moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_shared_expert_overlap
        moe_token_dispatcher_type nccl_all_reduce_for_prefill
        overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm
        overlap_p2p_comm overlap_p2p_comm_warmup_flush pipeline_dtype
        pipeline_model_parallel_comm_backend symmetric_ar_type tp_comm_atomic_ag tp_comm_atomic_rs
        tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap
        tp_comm_overlap_ag tp_comm_overlap_cfg tp_comm_overlap_disable_fc1
        tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
        tp_comm_split_rs use_ring_exchange_p2p
    """,
    "memory: what is kept, computed again or moved": """
        _cpu_offloading_context activation_offload_fraction checkpoint_activations
        clone_scatter_output_in_embedding cpu_offloading cpu_offloading_activations
        cpu_offloading_double_buffering cpu_offloading_num_layers
        cpu_offloading_retain_pinned_cpu_buffers cpu_offloading_weights
        deallocate_pipeline_outputs defer_embedding_wgrad_compute delay_offload_until_cuda_graph
        delta_offload_bytes_across_pp_ranks disable_parameter_transpose_cache
        distribute_saved_activations empty_unused_memory_level
        fine_grained_activation_offloading fine_grained_offloading_max_inflight_offloads
        fsdp_db_use_persist_buf_on_alloc_fail megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_max_pool_double_buffer memory_efficient_layer_norm
        min_offloaded_tensor_size mlp_chunks_for_prefill mlp_chunks_for_training
        moe_layer_recompute moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size
        num_microbatches_with_partial_activation_checkpoints offload_modules optimizer_cpu_offload
        optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params
        recompute_activations recompute_granularity recompute_method recompute_modules
        recompute_num_layers use_torch_optimizer_for_cpu_offload wgrad_deferral_limit
    """,
    "kernel: which code computes the same": """
        apply_rope_fusion attention_backend batch_invariant_mode bias_activation_fusion
        bias_dropout_fusion bias_swiglu_fusion
        deterministic_mode disable_bf16_reduced_precision_matmul enable_experimental
        flash_attention_version fused_residual_rmsnorm masked_softmax_fusion moe_grouped_gemm
        moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_fusion
        moe_router_padding_for_fp8 moe_router_padding_for_quantization no_persist_layer_norm
        optimizer_cuda_graph persist_layer_norm transformer_impl use_flash_attn
        use_te_activation_func
    """,
    "the softmax is in fp32 whatever this says": "attention_softmax_in_fp32",
    "a detail of CUDA graphs, which are refused": """
        cuda_graph_modules cuda_graph_retain_backward_graph cuda_graph_scope
        cuda_graph_use_single_mempool cuda_graph_warmup_steps
    """,
    "a detail of fp8 and fp4, which are named": """
        first_last_layers_bf16 fp4_param fp4_param_gather fp4_quantizer_factory fp4_recipe
        fp8_amax_compute_algo fp8_amax_history_len fp8_interval fp8_margin fp8_output_proj
        fp8_param fp8_param_gather fp8_quantizer_factory fp8_recipe fp8_wgrad
        num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 te_precision_config_file
        tp_only_amax_red
    """,
    "a detail of expert capacity, which is named": """
        moe_pad_expert_input_to_capacity moe_token_drop_policy
    """,
    "a detail of autocast, which is named": "autocast_dtype",
    "a detail of what is refused": """
        kitchen_attention_backend moe_router_quantile_balancing_ema moe_upcycling_granularity
        mup_attn_scale_power mup_base_head_dim mup_base_hidden_size mup_embedding_mult
        mup_output_mult mup_width_mult qk_clip_alpha qk_clip_threshold rope_scaling_factor
        use_kitchen_attention
    """,
    "dtype of weights and gradients": """
        accumulate_allreduce_grads_in_fp32 bf16 exp_avg_dtype exp_avg_sq_dtype grad_reduce_in_bf16
        main_grads_dtype main_params_dtype megatron_fsdp_grad_comm_dtype
        megatron_fsdp_main_grads_dtype megatron_fsdp_main_params_dtype params_dtype
        reuse_grad_buf_for_mxfp8_param_ag use_precision_aware_optimizer
    """,
    "loss scaling": "hysteresis initial_loss_scale loss_scale loss_scale_window min_loss_scale",
    "training: how long, on how much, when it stops": """
        batch_size check_for_large_grads check_for_nan_in_loss_and_grad
        check_weight_hash_across_dp_replicas_interval dataloader_type
        decrease_batch_size_if_needed deprecated_use_mcore_models dump_param_to_param_group_map
        exit_duration_in_mins exit_interval exit_signal exit_signal_handler
        exit_signal_handler_for_dataloader exit_signal_handler_for_training global_batch_size
        gpu_sniff_test_interval iterations_to_skip manual_gc manual_gc_eval manual_gc_interval
        micro_batch_size rampup_batch_size result_rejected_tracker_filename
        step_batch_size_schedule train_iters train_samples train_sync_interval
    """,
    "training: optimizer and learning rate": """
        adam_beta1 adam_beta2 adam_eps apply_wd_to_qk_layernorm clip_grad decoupled_lr
        decoupled_min_lr end_weight_decay lion_beta1 lion_beta2 lr lr_decay_iters lr_decay_samples
        lr_decay_style lr_warmup_fraction lr_warmup_init lr_warmup_iters lr_warmup_samples
        lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style min_lr muon_coefficient_type
        muon_extra_scale_factor muon_fp32_matmul_prec muon_momentum muon_nesterov
        muon_num_ns_steps muon_scalar_optimizer muon_scale_mode muon_tp_mode muon_use_nesterov
        no_weight_decay_cond_type override_opt_param_scheduler
        sgd_momentum start_weight_decay use_checkpoint_opt_param_scheduler warmup weight_decay
        weight_decay_incr_style
    """,
    "training: how losses are weighted and averaged": """
        calculate_per_token_loss fp16_lm_cross_entropy mtp_loss_scaling_factor
    """,
    "training: what it starts from": """
        data_parallel_random_init embedding_init_method embedding_init_method_std init_method
        init_method_std init_method_xavier_uniform init_model_with_meta_device
        output_layer_init_method perform_initialization seed te_rng_tracker use_cpu_initialization
        use_te_rng_tracker inference_rng_tracker
    """,
    "batches of packed conversations": """
        sft sft_tokenizer_prompt_format
    """,
    "rows beyond vocab_size, which are masked": "make_vocab_size_divisible_by",
    "set by the training loop": """
        experimental_attention_variant_loss_scale_func finalize_model_grads_func grad_scale_func
        grad_sync_func moe_grad_scale_func mtp_grad_scale_func no_sync_func param_sync_func timers
    """,
    "logging": "barrier_with_L1_time config_logger_dir moe_per_layer_logging test_mode",
    "inference with Megatron-Core": "inference_sampling_seed",
    "a detail of inference-optimized layers and CUDA graphs, which are refused": """
        inference_cuda_graph_scope inference_disable_triton_nvls_kernels
        inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type
    """,
    "nothing in Megatron-Core reads it": "moe_token_dropping",
    "RoPE is relative; refused where it does nothing": "reset_position_ids",
    "another name of --position-embedding-type": "use_rotary_position_embeddings",
    "of other models: nothing that a Step-3.5 model is built of reads it": """
        add_position_embedding bert_binary_head bias_gelu_fusion cache_mla_latents
        decoder_num_layers dsa_indexer_head_dim dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
        dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset
        dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_use_sparse_loss dsa_kernel_backend
        encoder_num_layers kv_lora_rank linear_attention_freq linear_conv_kernel_dim
        linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim
        mamba_head_dim mamba_num_groups mamba_num_heads mamba_state_dim
        mamba_training_ssm_states_dtype mla_down_proj_fusion mrope_section mscale mscale_all_dim
        onnx_safe q_lora_rank qk_head_dim qk_pos_emb_head_dim relative_attention_max_distance
        relative_attention_num_buckets rope_type rotary_scaling_factor
        use_fused_weighted_squared_relu use_mamba_mem_eff_path v_head_dim yarn_beta_fast
        yarn_beta_slow yarn_correction_range_round_to_int yarn_original_max_position_embeddings
    """,
}

# What StepFun's SFT of Step-3.5-Flash has, where Megatron's default is another one (SteptronOss:
# playground/sft/step3, steptronoss/optimizer/muon.py). Optimizers are a user's to choose: nothing
# is filled in.
_AUTHORS = {
    "adam_beta2": "0.95",
    "lr_decay_style": "cosine",
    "lr_warmup_iters": "140",
    "muon_coefficient_type": "polar_express",
    "muon_extra_scale_factor": "0.2",
    "muon_momentum": "0.95",
    "muon_nesterov": "on",
    "muon_num_ns_steps": "6",
    "muon_use_nesterov": "on",
    "weight_decay": "0.1, on one-dimensional weights too: --step35-decay-1d",
}

NEUTRAL_NAMES = {
    name: reason + (f" (the authors': {_AUTHORS[name]})" if name in _AUTHORS else "")
    for reason, names in _NAMES.items()
    for name in names.split()
}

# Titles of Megatron's argument groups.
NEUTRAL_GROUPS = {
    "In-process restart": "restarts",
    "Logits Distillation": "training: losses against another model's logits",
    "RNG and initialization": "training: what it starts from",
    "autoresume": "restarts",
    "biencoder": "of other models",
    "checkpointing": "checkpoints",
    "data and dataloader": "data",
    "distributed init": "layout and communication",
    "fault injector": "faults",
    "ft_package": "faults",
    "inference": "inference with Megatron-Core",
    "logging": "logging",
    "msc": "checkpoints",
    "one logger": "logging",
    "profiling": "profiling",
    "rerun engine": "faults",
    "rl": "training by reinforcement",
    "straggler": "logging",
    "tokenizer": "tokenizer",
    "validation": "evaluation",
    "vision": "of other models",
    "workload inspector": "logging",
}

"""Which tests take too long for their tier: some of their cases stay, the others are of the next one.

Seconds are of one core, all cases together. A test that is not named here is of the tier that its own
marks say.
"""

from collections import defaultdict

import pytest

from sampling import drawn

QUICK = {
    "accounting/test_flops.py::test_against_torch": 6,
    "accounting/test_flops.py::test_every_kind_of_adapter_against_torch": 4,
    "accounting/test_flops.py::test_halves_against_torch": 1,
    "accounting/test_flops_architectures.py::test_causal_models": 2,
    "accounting/test_flops_methods.py::test_a_round_of_a_method_against_torch": 1,  # 10 s
    "accounting/test_quantities.py::test_thousands_are_written_in_one_way": 0,
    "accounting/test_traffic.py::test_an_adaptive_number_of_logits_is_bounded_by_the_form": 0,
    "accounting/test_traffic.py::test_measured_is_the_closed_form": 2,  # 33 s
    "aggregation/test_assignment.py::test_every_small_case_is_solved_exactly": 1,
    "aggregation/test_lora.py::test_a_run_reports_it_by_round": 0,
    "architectures/test_sweep.py::test_a_configuration_that_names_another_token_for_padding": 0,
    "architectures/test_sweep.py::test_three_architectures": 1,
    "architectures/test_unusual.py::test_a_mixtures_adapter_is_saved_with_its_own_rank": 0,
    "architectures/test_unusual.py::test_a_router_that_is_a_linear_layer_gets_no_adapter": 0,
    "architectures/test_unusual.py::test_an_answer_does_not_depend_on_what_it_was_batched_with": 1,
    "architectures/test_unusual.py::test_dropout_of_the_backbone_is_off_where_there_is_a_reference": 0,
    "commands/test_api.py::test_a_function_is_called_with_every_step": 0,
    "commands/test_api.py::test_a_page_is_made_of_a_run": 0,
    "commands/test_api.py::test_a_run_is_scored_and_shown": 0,
    "commands/test_api.py::test_a_table_is_compared": 0,  # 6 s
    "commands/test_api.py::test_an_object_says_which_kind_its_rows_are": 0,
    "commands/test_api.py::test_functions_are_called_with_rounds_and_evaluations": 0,
    "commands/test_api.py::test_progress_is_shown_when_asked_for": 0,
    "commands/test_api.py::test_what_a_function_raises_ends_a_run_that_goes_on": 0,
    "commands/test_commands.py::test_a_benchmark_from_adapters_to_page": 0,
    "commands/test_commands.py::test_advise_prints_what_each_framework_costs_and_trains_nothing": 0,
    "commands/test_commands.py::test_evaluate_and_report": 0,  # 6 s
    "commands/test_commands.py::test_partition_and_run_say_which_layout_was_recognised": 0,
    "commands/test_commands.py::test_quiet_prints_the_result_alone": 0,
    "commands/test_commands.py::test_settings_can_be_changed": 0,
    "commands/test_commands.py::test_the_live_table_draws": 0,
    "commands/test_early_checks.py::test_a_mistake_is_told_in_the_words_of_the_check_and_what_is_right_passes": 0,
    "commands/test_early_checks.py::test_a_module_of_the_user_that_needs_what_is_absent_is_not_refused": 0,
    "commands/test_early_checks.py::test_the_recipes_pass": 0,
    "data/test_bad_files.py::test_a_file_that_is_not_what_it_claims_is_one_error": 12,
    "data/test_bad_files.py::test_a_line_of_300_mb_takes_no_memory": 1,
    "data/test_files_fuzz.py::test_a_hundred_files_end_in_rows_or_in_one_error": 0,
    "data/test_row_accounting.py::test_a_test_set_that_cannot_be_read_stops_the_run_before_it_begins": 0,
    "deployment/test_equality.py::test_simulation_and_machines_give_the_same": 1,  # 16 s
    "deployment/test_faults.py::test_a_bad_answer_is_left_out_with_the_reason": 0,  # 31 s
    "deployment/test_faults.py::test_a_file_of_all_clients_can_be_dealt_as_a_simulation_deals_it": 0,
    "deployment/test_faults.py::test_a_message_that_a_worker_died_over_is_begun_as_if_it_had_not_come": 0,
    "deployment/test_faults.py::test_a_message_that_comes_twice_is_answered_twice_and_done_once": 0,
    "deployment/test_faults.py::test_a_message_that_is_not_the_servers_is_not_answered": 0,
    "deployment/test_faults.py::test_a_model_of_the_clients_own_is_written_on_its_own_machine": 0,
    "deployment/test_faults.py::test_a_quorum_that_is_not_there_ends_the_run_with_its_state_saved": 0,
    "deployment/test_faults.py::test_another_is_drawn_for_who_is_lost": 0,
    "deployment/test_faults.py::test_another_model_or_version_is_not_let_in": 0,
    "deployment/test_faults.py::test_no_tensor_of_a_personal_part_is_in_any_message": 0,
    "deployment/test_faults.py::test_private_rows_stay_with_their_owners": 0,
    "deployment/test_faults.py::test_what_was_sent_before_a_run_was_resumed_is_not_done": 0,
    "deployment/test_faults.py::test_who_does_not_answer_in_time_is_left_out_and_its_late_answer_dropped": 0,
    "deployment/test_faults.py::test_who_is_not_let_in_does_not_take_part": 0,
    "deployment/test_flower_fleet.py::test_what_no_honest_client_sends_is_an_offence_of_its_kind": 4,
    "deployment/test_flower_node.py::test_a_bundle_that_unpacks_to_much_is_not_unpacked": 0,
    "deployment/test_malformed.py::test_the_same_client_twice_counts_once": 0,
    "deployment/test_page.py::test_commands_that_a_page_names_are_there": 17,
    "deployment/test_policy.py::test_schemas_beyond_the_bound_are_refused_before_anything_is_made": 3,
    "deployment/test_policy_enforcement.py::test_each_method_needs_the_lines_that_it_says": 20,
    "deployment/test_private_rows.py::test_a_simulation_of_a_file_for_each_client_has_the_bits_of_clients_with_rows_of_their_own": 0,
    "deployment/test_private_rows.py::test_clients_with_models_of_their_own_are_judged_on_their_own_rows": 0,
    "deployment/test_row_privacy.py::test_a_budget_holds_over_runs_and_coordinators": 0,  # 7 s
    "deployment/test_row_privacy.py::test_a_client_that_is_started_again_has_the_same_noise_for_the_same_request": 0,
    "deployment/test_row_privacy.py::test_a_run_leaves_its_ledgers_with_the_clients_and_no_key_anywhere": 0,
    "deployment/test_secure_sums.py::test_a_client_refuses_what_would_show_its_update": 0,
    "display/test_untrusted_text.py::test_rows_of_any_content_are_divided_trained_on_and_reported": 0,
    "engines/flower/test_attribution.py::test_a_wrong_answer_to_who_it_is_is_an_offence_of_who_owns_the_node": 0,
    "engines/flower/test_attribution.py::test_costs_are_those_of_the_exchange_and_last_no_longer_than_it_did": 0,
    "engines/flower/test_attribution.py::test_what_befalls_an_honest_client_is_no_offence": 0,
    "engines/flower/test_attribution.py::test_where_nobody_is_proven_only_what_is_signed_for_the_question_is_an_offence": 0,
    "engines/test_cohorts.py::test_a_cohort_repeats_to_the_bit_and_goes_on_after_a_stop": 0,
    "engines/test_cohorts.py::test_a_handler_that_trains_by_itself_goes_on_as_before": 0,
    "engines/test_cohorts.py::test_a_method_gives_the_same_whether_clients_are_trained_together": 0,
    "engines/test_cohorts.py::test_where_memory_does_not_suffice_clients_are_trained_one_by_one": 0,
    "engines/test_contract.py::test_an_action_that_there_is_not_fails_and_no_more": 2,
    "engines/test_contract.py::test_costs_of_the_work_reach_the_ledger": 1,
    "engines/test_contract.py::test_each_client_asked_answers_once_with_what_fits": 1,
    "engines/test_contract.py::test_it_knows_the_rows_of_each_client": 2,
    "engines/test_contract.py::test_it_knows_who_belongs_to_the_federation": 2,
    "engines/test_contract.py::test_what_fails_on_a_client_is_an_answer_that_says_so": 1,
    "engines/test_contract.py::test_who_is_not_asked_does_not_answer": 1,
    "engines/test_too_little_memory.py::test_the_rest_of_the_run_is_that_of_smaller_passes": 0,  # 8 s
    "engines/test_workers.py::test_a_reference_is_computed_once_whoever_asks": 0,
    "engines/test_workers.py::test_a_worker_that_ends_with_nothing_to_do_is_replaced": 0,
    "engines/test_workers.py::test_answers_to_what_was_given_up_do_not_count": 0,
    "engines/test_workers.py::test_any_order_of_answers_and_any_death_give_the_bits_of_one_process": 0,
    "engines/test_workers.py::test_log_probs_are_sent_to_a_worker_that_only_evaluated": 0,
    "engines/test_workers.py::test_more_workers_than_memory_are_refused_with_the_number_that_fits": 0,
    "engines/test_workers.py::test_sessions_of_a_cohort_are_made_anew_one_by_one": 0,
    "engines/test_workers.py::test_the_longest_is_begun_first_and_answers_come_in_the_order_of_requests": 0,
    "engines/test_workers.py::test_work_that_ends_its_worker_three_times_ends_the_round": 0,
    "evaluation/privacy_audit/test_span.py::test_alterations_hide_no_tokens": 1,
    "evaluation/privacy_audit/test_span.py::test_noise_of_differential_privacy_hides_them": 0,
    "evaluation/test_held_out.py::test_own_answers_are_judged": 0,
    "evaluation/test_metrics.py::test_rouge_l_by_hand": 0,
    "evaluation/test_rollouts.py::test_a_long_answer_leaves_a_prompt_half_the_context": 0,
    "experiment/test_keywords.py::test_a_table_and_keywords_run_as_a_file_with_set": 0,
    "experiment/test_mistakes.py::test_a_mistake_is_one_message_at_once": 8,
    "experiment/test_mistakes.py::test_a_mistake_is_told_in_these_words": 20,
    "experiment/test_mistakes.py::test_an_experiment": 18,
    "experiment/test_unused_settings.py::test_no_recipe_has_a_setting_that_does_nothing": 5,
    "federation/test_admission.py::test_a_record_says_whose_claim_was_cut_and_a_run_says_so_when_it_begins": 0,
    "federation/test_admission.py::test_a_repeat_offender_is_not_asked_for_some_rounds": 0,
    "federation/test_admission.py::test_an_offence_in_an_evaluation_counts": 0,
    "federation/test_admission.py::test_between_machines_a_claim_of_2_to_the_40_rows_is_cut_unless_any_is_allowed": 0,
    "federation/test_admission.py::test_no_honest_client_is_over_a_generous_bound": 1,  # 10 s
    "federation/test_admission.py::test_when_everybody_offends_the_run_stops": 0,
    "federation/test_admission.py::test_who_is_in_quarantine_is_asked_nothing_by_anybody": 0,
    "federation/test_clock.py::test_after_the_deadline_a_client_is_left_out_with_the_reason": 0,
    "federation/test_clock.py::test_lost_connections_are_drawn_by_client_and_round": 0,
    "federation/test_codec_choice.py::test_a_budget_is_of_what_a_method_sends_of_the_adapter": 0,
    "federation/test_codec_choice.py::test_a_budget_that_cannot_be_met_is_one_error_with_the_smallest_that_can": 0,
    "federation/test_codec_choice.py::test_a_run_that_is_stopped_and_resumed_chooses_the_same": 0,
    "federation/test_codec_choice.py::test_a_tensor_of_which_nothing_is_sent_comes_once_its_change_has_grown": 0,
    "federation/test_codec_choice.py::test_answers_of_no_fixed_size_are_refused_before_anything_is_trained": 1,
    "federation/test_codec_choice.py::test_no_answer_is_above_the_budget_and_bits_go_where_changes_are": 0,
    "federation/test_codec_choice.py::test_the_strongest_preset_within_the_error_is_chosen_and_kept": 0,
    "federation/test_compressed_exchange.py::test_a_client_without_its_store_is_refused_once_and_then_sent_the_whole": 0,
    "federation/test_compressed_exchange.py::test_a_run_that_is_stopped_and_resumed_gives_the_same_bits": 0,
    "federation/test_compressed_exchange.py::test_answers_that_are_kept_on_disk_count": 0,
    "federation/test_compressed_exchange.py::test_bytes_fall_and_the_loss_does_not_rise": 0,
    "federation/test_compressed_exchange.py::test_control_variates_have_no_error_feedback": 0,
    "federation/test_compressed_exchange.py::test_factors_of_any_rank_are_coded": 0,
    "federation/test_compressed_exchange.py::test_what_an_absent_client_lost_decays_and_is_dropped": 1,
    "federation/test_compressed_exchange.py::test_what_answers_of_alternating_halves_lose_is_kept_until_they_are_sent_again": 0,
    "federation/test_compressed_exchange.py::test_workers_of_which_some_end_give_the_bits_of_one_process": 0,
    "federation/test_informed_selection.py::test_as_many_candidates_as_places_is_sampling_by_rows": 0,
    "federation/test_reported.py::test_all_that_honest_clients_report_is_declared_and_let_in": 1,
    "federation/test_reported.py::test_an_objective_of_ones_own_declares_what_it_reports": 0,
    "federation/test_rounds.py::test_a_thousand_orders_of_arrival_give_the_same_bits": 0,  # 4 s
    "federation/test_secure_exchange.py::test_a_client_that_drops_out_at_any_stage_is_borne": 1,
    "federation/test_secure_exchange.py::test_a_heavy_client_weighs_by_its_rows": 0,
    "federation/test_secure_exchange.py::test_it_is_the_same_bits_with_other_keys_and_with_workers_of_which_some_end": 0,
    "federation/test_secure_exchange.py::test_the_mean_is_the_plain_one_up_to_rounding": 1,
    "federation/test_selection.py::test_a_run_records_its_selection_and_asks_those_that_it_draws": 0,
    "federation/test_server_memory.py::test_what_waits_on_disk_gives_the_same_bits": 0,
    "federation/test_streaming_mean.py::test_a_methods_rounds_have_the_same_bits": 0,
    "methods/contract/test_unseen_clients.py::test_only_a_newcomers_own_parts_are_fitted": 0,
    "methods/contract/test_unseen_clients.py::test_they_are_in_no_round_and_judged_twice": 0,  # 13 s
    "methods/test_absent_clients.py::test_fedamole_gives_each_client_the_experts_that_were_assigned_to_it": 0,
    "methods/test_aggregation_rules.py::test_every_method_that_averages_knows_the_rules": 0,  # 8 s
    "methods/test_aggregation_rules.py::test_one_attacker_of_five_moves_the_mean_far_and_no_robust_rule": 0,
    "methods/test_aggregation_rules.py::test_rules_of_model_merging_in_rounds": 0,
    "methods/test_aggregation_rules.py::test_the_mean_of_products_is_cut_to_the_rank_with_a_note": 0,
    "methods/test_aggregation_rules.py::test_too_few_answers_for_the_rule_stop_the_run": 0,
    "methods/test_distillation.py::test_a_client_that_gets_bad_knowledge_keeps_what_it_has": 0,
    "methods/test_distillation.py::test_all_logits_equal_the_k_likeliest_of_all": 0,
    "methods/test_distillation.py::test_answers_stand_in_the_order_of_the_rows_however_they_are_read": 1,
    "methods/test_distillation.py::test_bad_logits_leave_their_client_out_and_the_round_goes_on": 0,
    "methods/test_distillation.py::test_clients_keep_their_adapters_and_differ": 0,
    "methods/test_distillation.py::test_counts_that_do_not_add_up_leave_their_client_out": 1,
    "methods/test_distillation.py::test_every_rule_is_another": 0,
    "methods/test_distillation.py::test_no_parameter_travels": 0,  # 12 s
    "methods/test_distillation.py::test_rows_of_a_round_are_drawn_anew_and_known_to_all": 0,
    "methods/test_drift.py::test_moon_has_its_term_from_a_client_s_second_round_on": 0,
    "methods/test_drift.py::test_synthetic_examples_make_some_of_a_real_move": 0,
    "methods/test_exact_lora.py::test_a_client_that_missed_an_addition_is_left_out_and_brought_up_to_date": 0,
    "methods/test_exact_lora.py::test_a_client_whose_store_is_gone_says_so_and_is_brought_up_to_date": 0,
    "methods/test_exact_lora.py::test_factors_of_another_rank_than_the_clients_are_refused": 0,
    "methods/test_exact_lora.py::test_fedex_and_its_backbone_are_the_mean_of_products": 1,
    "methods/test_exact_lora.py::test_ffa_is_exact_and_fedavg_is_not": 0,
    "methods/test_exact_lora.py::test_flora_adds_the_mean_of_products_of_every_round": 0,
    "methods/test_exact_lora.py::test_with_one_rank_hetlora_is_fedavg_but_for_the_weights": 0,
    "methods/test_fed_et.py::test_a_larger_server_learns_from_logits_alone": 0,
    "methods/test_fed_sb.py::test_a_client_that_has_lost_its_factors_is_left_out_and_sent_them_again": 0,
    "methods/test_fed_sb.py::test_fixed_factors_are_sent_once_to_each_client_whenever_it_comes": 0,
    "methods/test_fed_sb.py::test_r_may_be_compressed_and_the_factors_are_sent_as_they_are": 0,
    "methods/test_fed_sb.py::test_rounds_keep_the_mean_of_products_and_the_factors": 1,
    "methods/test_fed_sb.py::test_what_is_saved_is_plain_lora": 0,
    "methods/test_fedamole.py::test_a_client_without_rows_for_an_embedding_set": 0,
    "methods/test_fedamole.py::test_a_reply_that_does_not_fit_leaves_its_client_out": 0,  # 13 s
    "methods/test_fedamole.py::test_ablations_draw_in_every_round_or_once": 0,
    "methods/test_fedamole.py::test_absent_clients_are_assigned_by_what_they_last_sent": 0,
    "methods/test_fedamole.py::test_an_expert_is_the_mean_of_its_holders_and_what_all_have_the_mean_of_all": 0,
    "methods/test_fedamole.py::test_an_expert_whose_holders_all_fail_keeps_its_value": 0,
    "methods/test_fedamole.py::test_bytes_are_the_closed_form_of_each_clients_assignment": 0,
    "methods/test_fedamole.py::test_every_round_keeps_the_limits_and_everyone_is_judged_by_its_own": 0,
    "methods/test_fedamole.py::test_gaussian_noise_is_as_large_as_is_promised": 0,
    "methods/test_fedamole.py::test_homogeneous_clients_hold_equally_many": 0,
    "methods/test_fedamole.py::test_newcomers_get_all_experts": 0,
    "methods/test_fedamole.py::test_one_client_holding_everything_is_shared_by_any_method": 0,
    "methods/test_fedamole.py::test_the_record_says_who_held_what_and_how_tokens_spread": 0,
    "methods/test_fedbuff.py::test_a_buffer_for_all_is_a_synchronous_round_with_equal_weights": 0,
    "methods/test_fedbuff.py::test_a_change_is_of_what_its_client_was_sent_and_what_it_lost_is_its_own": 0,
    "methods/test_fedbuff.py::test_killed_and_resumed_with_work_in_flight_ends_with_the_same_bits": 0,
    "methods/test_fedbuff.py::test_what_a_client_lost_before_an_answer_that_did_not_count_is_dropped": 0,
    "methods/test_fedbuff.py::test_with_codecs_a_run_that_is_killed_with_work_in_flight_ends_with_the_same_bits": 0,
    "methods/test_feddat.py::test_without_divergence_the_shared_adapter_is_fedavg_s_at_half_the_rate": 0,
    "methods/test_fedkseed.py::test_a_history_that_is_none_leaves_its_client_out": 0,
    "methods/test_fedmoe.py::test_bytes_are_the_held_experts_both_ways": 0,
    "methods/test_fedmoe.py::test_counts_that_cannot_be_ones_leave_their_client_out": 1,
    "methods/test_fedmoe.py::test_how_many_experts_a_client_may_hold": 1,
    "methods/test_fedmoe.py::test_mixed_precision_trains_experts_in_float32": 0,
    "methods/test_fedpdpo.py::test_alternating_trains_either_part_with_the_other_frozen": 0,
    "methods/test_fedpdpo.py::test_each_client_is_judged_by_its_own_parts": 0,
    "methods/test_fedpdpo.py::test_nothing_personal_is_in_any_payload": 0,
    "methods/test_fedpdpo.py::test_other_objectives_may_be_personal_too": 0,
    "methods/test_fedpdpo.py::test_with_all_parts_frozen_and_gamma_0_it_is_fedavg_of_dpo_bit_for_bit": 0,
    "methods/test_fedpdpo.py::test_without_parts_and_gamma_it_is_fedavg_of_dpo_bit_for_bit": 0,
    "methods/test_fedspallm.py::test_what_does_not_fit_its_mask_is_left_out": 1,
    "methods/test_lora_fair.py::test_less_is_lost_than_by_the_mean_of_the_factors": 0,
    "methods/test_lora_family.py::test_alpha_twice_as_large_is_b_twice_as_large": 4,
    "methods/test_lora_family.py::test_only_what_goes_to_the_backbone_is_below_the_floor_of_a_rank": 1,
    "methods/test_lora_family.py::test_rolora_reaches_what_ffa_cannot": 0,
    "methods/test_lora_family.py::test_rounds_without_training_leave_the_model_as_it_is": 5,
    "methods/test_lora_family_absent.py::test_what_is_put_together_is_of_who_answered": 0,
    "methods/test_mixed_starts.py::test_fedala_mixes_the_last_tensors_alone_in_passes_until_the_loss_settles": 0,
    "methods/test_personalised.py::test_clients_are_judged_by_what_they_would_use": 0,  # 9 s
    "methods/test_personalised.py::test_ffa_lora_never_trains_a_and_halves_the_bytes": 0,
    "methods/test_personalised.py::test_what_travels_and_what_stays": 0,
    "methods/test_plugins.py::test_a_source_of_others": 0,
    "methods/test_plugins.py::test_it_runs_and_a_resume_with_another_file_is_refused": 0,
    "methods/test_random_projection.py::test_the_function_counts_once_before_the_first_step_and_twice_a_step": 0,
    "methods/test_random_projection.py::test_with_as_many_dimensions_as_numbers_it_is_fedavg": 0,
    "methods/test_ravan.py::test_at_equal_numbers_it_reaches_more_of_a_flat_target_than_two_ranks": 0,
    "methods/test_regmean.py::test_stacks_of_experts_are_refused_before_anything_is_trained": 1,
    "methods/test_reveals.py::test_an_adapter_of_a_larger_rank_than_allowed_is_not_held": 0,
    "methods/test_reveals.py::test_labels_at_the_client_are_not_revealed": 0,
    "methods/test_reveals.py::test_replies_hold_what_it_says": 1,  # 8 s
    "methods/test_reveals.py::test_what_is_not_allowed_is_not_computed_and_nothing_is_kept": 2,
    "methods/test_split.py::test_a_bad_step_leaves_its_client_out": 1,
    "methods/test_split.py::test_a_client_lost_in_the_middle_of_a_round": 1,
    "methods/test_split.py::test_a_client_refuses_a_bad_gradient_and_keeps_its_last_good_adapter": 1,
    "methods/test_split.py::test_a_client_that_never_ends_its_round_is_left_out": 0,
    "methods/test_split.py::test_activations_that_blow_the_server_up_leave_their_client_out": 1,
    "methods/test_split.py::test_dropout_is_each_partys_own_and_repeatable": 0,
    "methods/test_split.py::test_every_encoding_learns_nearly_the_same": 0,
    "methods/test_split.py::test_gradients_that_blow_the_server_up_leave_their_client_out": 1,  # 5 s
    "methods/test_split.py::test_labels_stay_home_in_u_shape": 0,
    "methods/test_split.py::test_one_client_is_centralised_training_bit_for_bit": 1,  # 15 s
    "methods/test_split.py::test_the_parallel_mean_is_the_mean_of_training_alone": 0,
    "methods/test_split.py::test_the_same_bits_again": 0,
    "methods/test_split.py::test_the_server_in_turn_learns_from_every_client": 0,
    "models/test_adapters.py::test_every_kind_is_saved_loaded_and_trained_by_peft": 5,
    "models/test_adapters.py::test_names_and_values_are_those_of_peft": 1,
    "models/test_experts.py::test_the_stacked_layer_is_the_loop_forward_and_backward": 6,
    "models/test_heads.py::test_flops_are_those_torch_counts": 2,
    "models/test_lora_variants.py::test_a_saved_variant_is_the_model_in_plain_peft": 2,
    "models/test_lora_variants.py::test_operations_are_those_that_torch_counts": 2,
    "models/test_matrix.py::test_each_trains_and_loads_as_it_was_or_is_refused": 1,
    "models/test_own_code.py::test_every_call_of_a_loader_says_so": 0,
    "models/test_quantize.py::test_dpo_and_kto_train_on_it_and_the_adapter_scores_the_same": 0,
    "models/test_split_model.py::test_every_cut_gives_the_whole_models_loss_and_gradients": 1,  # 12 s
    "oracles/test_chat.py::test_pairs_and_single_answers_are_trls": 6,
    "privacy/test_client_level.py::test_a_client_moves_the_sum_of_a_thousand_random_models_by_at_most_the_clip": 0,
    "privacy/test_private_mean.py::test_a_secret_cohort_costs_what_the_table_of_sampled_noise_says": 1,
    "recipes/test_recipes.py::test_a_comparison_is_read": 8,  # 21 of 6 s
    "recipes/test_recipes.py::test_recipe": 1,  # 19 s
    "reports/sections/test_expert_assignment.py::test_many_rounds_are_thinned_to_the_first_the_last_and_some_between": 0,
    "reports/test_comparison_sections.py::test_folders_of_earlier_releases_open_with_what_can_be_told_from_them": 0,
    "reports/test_comparison_sections.py::test_methods_of_one_framework_without_personal_models_have_neither": 0,
    "reports/test_comparison_sections.py::test_runs_say_which_sections_there_are_beside_the_one_that_was_asked_for": 0,
    "reports/test_doubts.py::test_a_run_that_was_resumed_elsewhere_says_so_on_its_page": 0,
    "reports/test_doubts.py::test_every_comparison_shows_and_tells_them": 0,
    "reports/test_figures.py::test_every_client_and_value_is_named": 1,
    "reports/test_judged.py::test_a_headline_has_colour_only_where_the_change_is_shown": 0,
    "reports/test_judged.py::test_a_run_says_how_sure_it_is": 0,
    "reports/test_judged.py::test_comparisons_of_few_seeds_say_what_is_missing": 0,
    "reports/test_judged.py::test_runs_of_earlier_versions_have_what_their_number_of_rows_gives": 0,
    "reports/test_run_page.py::test_a_page_of_many_clients_is_small_and_searched": 0,
    "reports/test_run_page.py::test_a_page_says_what_became_of_pairs": 0,
    "reports/test_run_page.py::test_a_run_that_was_stopped_says_so": 0,
    "reports/test_run_page.py::test_offences_are_shown_by_client_and_answers_left_out_are_not_without_end": 0,
    "reports/test_run_page.py::test_rejected_clients_and_dropped_rows_are_shown": 0,
    "reports/test_run_page.py::test_the_account_of_rows_is_shown": 0,
    "reports/test_run_page.py::test_the_page_needs_no_network": 0,
    "reports/test_run_page.py::test_what_models_and_data_say_is_escaped": 0,
    "reports/test_run_page.py::test_who_was_missing_is_shown_with_rounds_and_reason": 0,
    "runs/privacy_audit/test_audit.py::test_a_model_that_was_trained_on_neither_tells_nothing": 0,
    "runs/privacy_audit/test_audit.py::test_an_adapter_that_repeats_its_rows_is_found_out": 0,
    "runs/privacy_audit/test_audit.py::test_tokens_of_a_step_are_read_from_updates": 0,
    "runs/privacy_audit/test_audit.py::test_what_cannot_be_attacked_says_why": 0,
    "runs/privacy_audit/test_audit.py::test_whole_weights_tell_tokens_too": 0,
    "runs/test_amplification.py::test_a_resume_draws_the_same_cohorts_which_follow_from_the_key_alone": 0,
    "runs/test_amplification.py::test_advise_gives_both": 1,
    "runs/test_amplification.py::test_no_command_shows_the_servers_own_folder": 0,
    "runs/test_benchmarks.py::test_a_real_adapter_answers_and_the_key_is_nowhere": 0,
    "runs/test_benchmarks.py::test_answers_are_kept_when_a_judge_fails_and_used_again": 0,
    "runs/test_benchmarks.py::test_more_than_three_models_are_shown_in_drawn_orders": 0,
    "runs/test_benchmarks.py::test_several_judges_and_their_agreement": 0,
    "runs/test_benchmarks.py::test_the_three_benchmarks_end_to_end": 0,  # 8 s
    "runs/test_client_privacy.py::test_a_resume_spends_once_and_ends_with_the_same_bits": 0,
    "runs/test_client_privacy.py::test_a_round_for_which_nobody_is_drawn_releases_noise": 0,
    "runs/test_client_privacy.py::test_a_run_says_what_it_promises_and_keeps_its_key_to_itself": 0,
    "runs/test_client_privacy.py::test_every_method_that_declares_it_takes_its_means_there": 1,
    "runs/test_comparison.py::test_a_grid_is_run_once_and_reported": 0,  # 17 s
    "runs/test_comparison.py::test_another_model_than_of_what_is_done_is_told": 0,
    "runs/test_comparison.py::test_other_versions_and_rows_than_of_what_is_done_are_told": 0,
    "runs/test_comparison.py::test_two_comparisons_do_not_write_into_one_folder": 0,
    "runs/test_cost_estimate.py::test_a_slow_link_speaks_against_much_traffic": 0,
    "runs/test_cost_estimate.py::test_privacy_is_advised_as_a_run_states_it": 0,
    "runs/test_cost_estimate.py::test_tokens_are_counted_in_the_order_of_a_run": 0,
    "runs/test_cost_estimate.py::test_what_does_not_fit_is_said_and_another_proposed": 0,
    "runs/test_cost_estimate.py::test_what_is_advised_is_what_a_run_does": 0,  # 14 s
    "runs/test_export.py::test_a_classifier_of_a_source_object_has_its_classes": 0,  # 13 s
    "runs/test_export.py::test_a_plain_run_exports_its_global_model": 0,  # 10 s
    "runs/test_export.py::test_who_there_is_is_said": 0,
    "runs/test_initial_adapter.py::test_dpo_starts_from_what_sft_made_and_its_reference_is_that": 0,
    "runs/test_initial_adapter.py::test_every_log_ratio_is_exactly_0_before_any_step": 0,
    "runs/test_partitioning.py::test_the_account_closes_and_no_prompt_is_on_both_sides_in_any_combination": 0,
    "runs/test_private_messages.py::test_but_for_noisy_sums_nothing_depends_on_rows": 0,
    "runs/test_private_messages.py::test_under_secure_aggregation_answers_are_masked_whole": 0,
    "runs/test_profiling.py::test_a_profiled_run_leaves_a_trace_and_the_same_adapter": 0,  # 10 s
    "runs/test_profiling.py::test_a_resumed_run_has_a_trace_of_its_own": 0,
    "runs/test_row_privacy.py::test_a_resumed_run_has_the_same_bits": 0,
    "runs/test_row_privacy.py::test_a_run_says_what_it_promises_its_rows": 0,
    "runs/test_row_privacy.py::test_steps_that_are_made_again_with_other_sums_count_again": 0,
    "runs/test_row_privacy.py::test_units_are_values_of_a_column_and_delta_is_below_one_over_them": 0,
    "runs/test_run.py::test_a_changed_model_is_refused": 0,
    "runs/test_run.py::test_a_classifier_loads_with_peft_and_scores_the_same": 0,
    "runs/test_run.py::test_a_client_with_a_nan_loss_is_named_and_the_round_goes_on": 0,
    "runs/test_run.py::test_a_full_disk_stops_cleanly_and_the_run_can_go_on": 0,
    "runs/test_run.py::test_a_round_of_one_class_and_a_client_of_one_row_are_flagged": 0,
    "runs/test_run.py::test_a_tensorboard_file_is_written_when_asked": 0,
    "runs/test_run.py::test_a_truncated_checkpoint_is_refused_and_the_one_before_continues": 0,
    "runs/test_run.py::test_an_edited_folder_is_refused_by_the_fingerprint": 0,
    "runs/test_run.py::test_every_method_is_judged_on_every_clients_own_rows": 0,
    "runs/test_run.py::test_every_objective_runs_under_every_method": 1,  # 50 s
    "runs/test_run.py::test_incomplete_pairs_are_dropped_and_counted_or_become_feedback": 0,
    "runs/test_run.py::test_interrupted_and_resumed_equals_uninterrupted": 0,
    "runs/test_run.py::test_local_only_sends_numbers_and_no_tensors": 0,
    "runs/test_run.py::test_one_client_equals_centralised_bit_for_bit": 1,  # 17 s
    "runs/test_run.py::test_own_data_and_own_objective_need_no_change_to_the_package": 0,
    "runs/test_run.py::test_pairs_are_unrolled_for_kto_and_judged_as_pairs": 0,
    "runs/test_run.py::test_partial_participation_and_evaluation_every_n_rounds": 0,
    "runs/test_run.py::test_resuming_a_finished_run_changes_nothing": 0,
    "runs/test_run.py::test_resuming_as_another_experiment_names_the_difference": 0,
    "runs/test_run.py::test_what_killed_writers_left_is_swept_and_nothing_else": 0,
    "runs/test_run.py::test_when_every_client_fails_the_run_stops_and_keeps_what_it_had": 0,
    "runs/test_run.py::test_who_stops_a_resumed_run_at_once_is_told_what_is_saved": 0,
    "runs/test_selections.py::test_candidates_are_sent_the_model_and_their_losses_are_counted": 0,
    "runs/test_selections.py::test_interrupted_it_draws_the_same": 0,
    "runs/test_selections.py::test_what_a_client_tells_is_the_loss_of_its_training": 1,
    "runs/test_streaming.py::test_an_adapter_is_that_of_rows_in_memory": 0,  # 8 s
    "runs/test_trackers.py::test_every_round_is_logged_as_it_is_recorded_and_the_trackers_are_closed": 0,
    "runs/test_tuning.py::test_cohorts_are_timed_over_the_same_clients_and_steps": 0,
    "runs/test_tuning.py::test_the_command_times_an_experiment_and_its_file_stays_sound": 0,
    "runs/test_verification.py::test_a_clients_own_model_that_came_out_wrong_is_named": 0,
    "runs/test_verification.py::test_a_deployed_client_says_that_its_model_came_out_wrong": 0,
    "runs/test_verification.py::test_a_sound_run_says_so": 0,
    "runs/test_verification.py::test_an_adapter_that_came_out_wrong_is_an_error_and_stays": 0,
    "runs/test_verification.py::test_an_export_is_compared_with_what_was_merged": 0,
    "security/test_audit_log.py::test_a_day_of_a_client_that_does_its_worst_in_bytes": 0,
    "security/test_audit_log.py::test_a_resumed_run_goes_on_with_its_log": 0,
    "security/test_damaged_log.py::test_the_coordinator_is_told_and_the_run_goes_on": 0,
    "storage/test_run_folders.py::test_a_damaged_record_stops_a_resume_and_is_named": 0,
    "storage/test_run_folders.py::test_a_run_made_with_objects_is_resumed_with_the_same": 0,
    "storage/test_run_folders.py::test_lines_beyond_the_checkpoint_are_cut_off_and_the_totals_are_those_of_a_whole_run": 0,  # 5 s
    "test_by_hand.py::test_the_package_equals_the_page": 0,
    "test_docs.py::test_commands_on_a_page_exist_with_their_options": 7,
    "test_examples.py::test_example": 0,  # 5 s, and 33 s to train the tiny model
    "test_mutants.py::test_every_part_has_modules_and_every_module_tests": 0,
    "test_public.py::test_python_in_the_readme_runs": 0,
    "test_words.py::test_every_exception_is_still_needed": 0,
    "training/test_budgets.py::test_a_budget_is_what_a_client_computes": 0,
    "training/test_budgets.py::test_pfedme_always_ends_its_inner_steps": 1,
    "training/test_cohort.py::test_each_client_ends_where_it_would_by_itself": 1,
    "training/test_layout.py::test_a_batch_in_which_nothing_counts_is_left_out_and_counted": 4,
    "training/test_layout.py::test_a_statistic_of_the_batch_takes_no_pass_of_its_own": 1,
    "training/test_layout.py::test_gradients_are_those_of_one_padded_batch": 2,
    "training/test_row_privacy.py::test_a_row_moves_others_by_a_statistic_of_the_batch_alone": 1,
    "training/test_row_privacy.py::test_gradients_of_rows_are_those_of_each_alone": 1,
    "training/test_steps.py::test_every_objective_learns": 0,  # 12 s
    "training/test_steps.py::test_micro_batches_change_nothing_beyond_rounding": 1,
    "training/test_steps.py::test_micro_batches_of_a_mixture_change_nothing_either": 0,
    "training/test_steps.py::test_same_seed_same_bits_and_other_rounds_other_bits": 2,
    "training/test_steps.py::test_the_loss_without_training_is_that_of_the_first_step": 1,
}
"""How many cases of a test stay in the default suite, evenly spaced; the others are slow."""

SLOW = {
    "accounting/test_flops.py::test_every_kind_of_adapter_against_torch": 4,
    "accounting/test_flops_architectures.py::test_causal_models": 6,
    "accounting/test_flops_methods.py::test_a_round_of_a_method_against_torch": 3,
    "accounting/test_traffic.py::test_measured_is_the_closed_form": 4,
    "architectures/test_sweep.py::test_a_configuration_that_names_another_token_for_padding": 3,
    "commands/test_commands.py::test_ctrl_c_and_sigterm_end_cleanly_and_say_how_to_go_on": 1,
    "commands/test_demo.py::test_preferences_are_learnt_and_a_split_by_domain_is_harder": 0,
    "commands/test_early_checks.py::test_every_command_refuses_as_a_process_within_four_seconds_of_cpu": 5,
    "data/test_bad_files.py::test_a_file_that_is_not_what_it_claims_is_one_error": 13,
    "data/test_files_fuzz.py::test_thousands_of_files_end_in_rows_or_in_one_error": 0,
    "data/test_real_sets.py::test_a_public_set_is_read_as_it_is": 4,
    "data/test_real_sets.py::test_a_public_set_is_trained_as_it_is": 2,
    "deployment/test_absences.py::test_a_round_without_a_member_says_without_whom_and_why": 2,
    "deployment/test_absences.py::test_a_run_that_asks_for_all_does_not_begin_and_says_for_whom_it_waited": 3,
    "deployment/test_chaos.py": 0,  # 12 minutes
    "deployment/test_deaths.py": 2,  # 35 s each
    "deployment/test_equality.py::test_compressed_rounds_are_the_same_between_machines": 1,
    "deployment/test_equality.py::test_simulation_and_machines_give_the_same": 2,
    "deployment/test_faults.py::test_a_bad_answer_is_left_out_with_the_reason": 3,
    "deployment/test_faults.py::test_a_client_that_is_started_anew_still_has_what_it_keeps": 1,
    "deployment/test_faults.py::test_what_a_client_kept_over_an_answer_that_does_not_count_is_undone": 1,
    "deployment/test_faults.py::test_what_does_not_count_is_undone_by_a_run_that_is_resumed_too": 1,
    "deployment/test_kills.py": 0,  # 3 minutes each
    "deployment/test_malformed.py::test_fifteen_malformed_updates": 0,
    "deployment/test_members_lives.py": 1,  # 40 s each
    "deployment/test_methods_on_machines.py": 1,
    "deployment/test_network.py": 1,  # a minute each
    "deployment/test_policy.py::test_a_round_of_many_exchanges_is_one": 2,
    "deployment/test_policy_enforcement.py::test_each_method_needs_the_lines_that_it_says": 12,
    "deployment/test_private_rows.py::test_a_simulation_of_a_file_for_each_client_has_the_bits_of_clients_with_rows_of_their_own": 2,
    "deployment/test_releases.py": 1,
    "deployment/test_returning.py::test_a_run_over_links_that_break_is_one_over_links_that_hold": 1,
    "deployment/test_secure_sums.py::test_a_client_killed_before_a_stage_has_dropped_out_there": 2,
    "deployment/test_secure_sums_on_machines.py": 1,  # half a minute each
    "deployment/test_slow_link.py": 0,  # 2 minutes
    "deployment/test_start.py::test_machines_start_from_the_same": 1,
    "display/test_untrusted_text.py::test_a_figure_of_any_name_can_be_drawn_and_read": 4,
    "engines/test_cohorts.py::test_a_method_gives_the_same_whether_clients_are_trained_together": 3,
    "engines/test_ray.py": 1,  # 2 minutes each
    "engines/test_too_little_memory.py::test_the_rest_of_the_run_is_that_of_smaller_passes": 1,
    "engines/test_workers.py::test_any_order_of_answers_and_any_death_give_the_bits_of_one_process": 2,
    "evaluation/test_harness.py::test_a_name_near_a_task_of_lm_evals_is_told": 0,
    "evaluation/test_stop_tokens.py::test_answers_stop_by_themselves": 0,
    "experiment/test_mistakes.py::test_a_mistake_is_one_message_at_once": 30,
    "experiment/test_mistakes.py::test_a_mistake_is_told_in_these_words": 30,
    "experiment/test_mistakes.py::test_an_experiment": 30,
    "experiment/test_unused_settings.py::test_no_recipe_has_a_setting_that_does_nothing": 10,
    "federation/test_admission.py::test_no_honest_client_is_over_a_generous_bound": 4,
    "federation/test_codec_choice.py::test_a_run_that_is_stopped_and_resumed_chooses_the_same": 1,
    "federation/test_compressed_exchange.py::test_control_variates_have_no_error_feedback": 1,
    "federation/test_compressed_exchange.py::test_factors_of_any_rank_are_coded": 2,
    "federation/test_federation_tax.py::test_rounds_cost_little_beside_their_steps_and_come_to_the_same_bits": 0,
    "federation/test_reported.py::test_all_that_honest_clients_report_is_declared_and_let_in": 3,
    "federation/test_secure_exchange.py::test_the_mean_is_the_plain_one_up_to_rounding": 4,
    "federation/test_secure_memory.py": 1,  # a minute each
    "federation/test_server_memory.py::test_memory_is_flat_from_4_clients_on": 1,
    "methods/contract/test_unseen_clients.py::test_they_are_in_no_round_and_judged_twice": 3,
    "methods/test_absent_clients.py::test_fedamole_gives_each_client_the_experts_that_were_assigned_to_it": 2,
    "methods/test_absent_clients.py::test_fedavg_is_the_mean_of_who_answered": 3,
    "methods/test_absent_clients.py::test_fedmoe_gives_each_client_the_experts_of_its_own_probe": 3,
    "methods/test_absent_clients.py::test_scaffold_moves_c_by_all_changes_over_the_number_of_all_clients": 3,
    "methods/test_absent_clients.py::test_the_backbone_takes_every_round_and_nobody_loses_one": 3,
    "methods/test_absent_clients.py::test_weights_and_closed_forms_are_of_who_answered": 2,
    "methods/test_aggregation_rules.py::test_every_method_that_averages_knows_the_rules": 4,
    "methods/test_aggregation_rules.py::test_one_attacker_of_five_moves_the_mean_far_and_no_robust_rule": 3,
    "methods/test_distillation.py::test_bad_logits_leave_their_client_out_and_the_round_goes_on": 3,
    "methods/test_distillation.py::test_every_rule_trains_server_and_clients": 2,
    "methods/test_distillation.py::test_mixed_clients_know_more_than_each_by_itself": 0,
    "methods/test_distillation.py::test_no_parameter_travels": 3,
    "methods/test_drift.py::test_synthetic_examples_make_some_of_a_real_move": 1,
    "methods/test_fedamole.py::test_a_reply_that_does_not_fit_leaves_its_client_out": 2,
    "methods/test_fedamole.py::test_noise_is_on_embeddings_alone_and_new_in_every_round": 1,
    "methods/test_fedbuff.py::test_changes_of_who_answered_alone_are_added": 3,
    "methods/test_flexlora.py::test_over_twenty_rounds_with_two_of_six_clients_no_rank_is_lost": 1,
    "methods/test_lora_family.py::test_alpha_twice_as_large_is_b_twice_as_large": 3,
    "methods/test_lora_family.py::test_only_what_goes_to_the_backbone_is_below_the_floor_of_a_rank": 4,
    "methods/test_lora_family.py::test_rounds_without_training_leave_the_model_as_it_is": 3,
    "methods/test_lora_family_absent.py::test_what_is_put_together_is_of_who_answered": 4,
    "methods/test_personalised.py::test_clients_are_judged_by_what_they_would_use": 3,
    "methods/test_personalised.py::test_what_travels_and_what_stays": 3,
    "methods/test_reveals.py::test_no_request_takes_more_batches_than_it_says": 3,
    "methods/test_reveals.py::test_replies_hold_what_it_says": 3,
    "methods/test_reveals.py::test_what_is_not_allowed_is_not_computed_and_nothing_is_kept": 4,
    "methods/test_split.py::test_a_bad_step_leaves_its_client_out": 3,
    "methods/test_split.py::test_gradients_that_blow_the_server_up_leave_their_client_out": 3,
    "methods/test_split.py::test_one_client_is_centralised_training_bit_for_bit": 3,
    "models/test_adapters.py::test_every_kind_is_saved_loaded_and_trained_by_peft": 5,
    "models/test_consistency.py::test_all_of_a_head_that_begins_anew_is_trained_and_saved": 6,
    "models/test_experts.py::test_the_stacked_layer_is_the_loop_forward_and_backward": 3,
    "models/test_heads.py::test_flops_are_those_torch_counts": 8,
    "models/test_loading_by_card.py::test_what_a_method_leaves_loads_by_its_card": 2,
    "models/test_loading_by_card.py::test_what_needs_fedloom_loads_by_its_card_too": 1,
    "models/test_lora_variants.py::test_a_saved_variant_is_the_model_in_plain_peft": 4,
    "models/test_own_code.py::test_the_harness_is_told_so": 0,
    "models/test_split_model.py::test_every_cut_gives_the_whole_models_loss_and_gradients": 4,
    "privacy/test_accounting.py::test_forty_settings_agree_with_opacus_and_the_closed_form": 0,
    "privacy/test_accounting.py::test_the_table_of_noise_for_a_target": 1,  # 7 s each
    "privacy/test_accounting.py::test_the_table_of_privacy_loss_distributions": 4,
    "recipes/test_recipes.py::test_a_comparison_is_read": 5,
    "recipes/test_recipes.py::test_comparison": 1,
    "recipes/test_recipes.py::test_comparison_of_frameworks": 1,
    "recipes/test_recipes.py::test_comparison_of_personal_models": 1,
    "recipes/test_recipes.py::test_recipe": 2,
    "reports/sections/test_costs.py::test_a_grid_to_its_page": 0,
    "runs/test_client_privacy.py::test_every_method_that_declares_it_takes_its_means_there": 3,
    "runs/test_client_privacy.py::test_twenty_rounds_killed_twice_cost_what_one_direct_call_says": 0,
    "runs/test_comparison.py::test_a_worker_that_is_killed_is_said_and_the_grid_goes_on": 0,
    "runs/test_cost_estimate.py::test_what_is_advised_is_what_a_run_does": 3,
    "runs/test_initial_adapter.py::test_adapters_of_other_kinds_are_started_from": 2,
    "runs/test_initial_adapter.py::test_clients_start_from_what_is_their_own": 2,
    "runs/test_initial_adapter.py::test_every_log_ratio_is_exactly_0_before_any_step": 3,
    "runs/test_ledger_kills.py::test_killed_at_random_moments_it_never_counts_too_little_nor_twice": 1,
    "runs/test_private_messages.py::test_but_for_noisy_sums_nothing_depends_on_rows": 3,  # 3 s each
    "runs/test_private_messages.py::test_under_secure_aggregation_answers_are_masked_whole": 3,
    "runs/test_progress.py::test_from_the_third_round_on_what_is_left_is_right_within_a_fifth": 0,
    "runs/test_run.py::test_any_objective_interrupted_and_resumed_equals_uninterrupted": 2,
    "runs/test_run.py::test_every_method_is_judged_on_every_clients_own_rows": 3,
    "runs/test_run.py::test_every_objective_runs_under_every_method": 3,
    "runs/test_run.py::test_interrupted_and_resumed_equals_uninterrupted": 1,
    "runs/test_run.py::test_kill_minus_9_at_random_moments": 0,
    "runs/test_run.py::test_one_client_equals_centralised_bit_for_bit": 3,
    "runs/test_selections.py::test_every_method_tells_what_oort_goes_by": 3,
    "runs/test_selections.py::test_interrupted_it_draws_the_same": 2,
    "runs/test_selections.py::test_what_a_client_tells_is_the_loss_of_its_training": 5,
    "runs/test_streaming.py::test_memory_is_bounded": 0,
    "security/test_hostile_server.py::test_what_chooses_rows_or_models_has_no_effect": 2,
    "security/test_one_port.py::test_flowers_command_line_gets_no_answer": 2,
    "storage/test_run_folders.py::test_a_damaged_record_stops_a_resume_and_is_named": 6,
    "test_docs.py::test_python_on_the_page_about_the_command_line_runs": 0,
    "test_guides.py::test_the_guide_of_a_private_deployment": 0,  # 3 minutes
    "test_guides.py::test_the_page_of_reproducibility": 0,
    "training/test_layout.py::test_a_batch_in_which_nothing_counts_is_left_out_and_counted": 5,
    "training/test_layout.py::test_another_number_of_threads_changes_rounding_alone": 1,
    "training/test_layout.py::test_final_adapters_are_those_of_padded_batches": 2,
    "training/test_layout.py::test_gradients_are_those_of_one_padded_batch": 5,
    "training/test_memory.py::test_a_large_vocabulary_takes_little_memory": 0,
    "training/test_row_privacy.py::test_gradients_of_rows_are_those_of_each_alone": 4,
    "training/test_steps.py::test_every_objective_learns": 2,
    "wire/codecs/test_codecs_fuzz.py::test_a_hundred_thousand_damaged_messages": 0,
}
"""How many cases of a slow test, or of a file's slow tests, stay so, drawn by the commit's hash; the others
are of the full suite."""

LONG = (
    "deployment/test_deploy.py",
    "deployment/test_members_lives.py",
    "deployment/test_methods_on_machines.py",
    "deployment/test_page.py",
    "deployment/test_proxy.py",
    "deployment/test_releases.py",
    "deployment/test_row_privacy.py",
    "deployment/test_secure_sums_on_machines.py",
    "deployment/test_stuck.py",
    "engines/test_ray.py",
    "engines/test_workers.py",
    "federation/test_secure_memory.py",
    "recipes/test_recipes.py",
    "runs/test_comparison.py",
    "runs/test_ledger_kills.py",
    "security/test_one_port.py",
    "test_examples.py",
    "test_guides.py",
    "test_two_writers.py",
)
"""Files whose slow tests take a minute or more, few as they are, and wait for processes meanwhile: they are
begun one after the other among the others, and none of them last, when a worker would be left alone with it."""


def spread(files, long):
    """Return files in an order with the long ones evenly among the first of the others."""
    apart, others = (
        [own for own in files if (own in long) == is_long] for is_long in (True, False)
    )
    step, found = max(1, len(others) // (len(apart) + 1)), []
    for place, own in enumerate(others):
        if place % step == 0 and apart:
            found.append(apart.pop(0))
        found.append(own)
    return found + apart


def spread_over_workers(items):
    """Put the files of tests into the order in which workers take them."""
    files = defaultdict(list)
    for item in items:
        files[item.nodeid.partition("::")[0].removeprefix("tests/")].append(item)
    items[:] = [item for file in spread(list(files), LONG) for item in files[file]]


def sort_into_tiers(items):
    """Mark the cases of the tests that are named above: first who is slow, then which of these are full."""
    for name, own in _cases(items, QUICK, slow=False).items():
        stay = spaced(len(own), QUICK[name])
        for place, item in enumerate(own):
            if place not in stay:
                item.add_marker(pytest.mark.slow)
    for name, own in _cases(items, SLOW, slow=True).items():
        stay = drawn(name).sample(range(len(own)), min(SLOW[name], len(own)))
        for place, item in enumerate(own):
            if place not in stay:
                item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
                item.add_marker(pytest.mark.full)


def _cases(items, names, slow):
    """Return the cases of each test, or of each file's tests, that is named; only slow ones, or only others."""
    cases = defaultdict(list)
    for item in items:
        test = item.nodeid.removeprefix("tests/").partition("[")[0]
        is_slow, full = (item.get_closest_marker(mark) is not None for mark in ("slow", "full"))
        if is_slow == slow and not full:
            for name in {test, test.partition("::")[0]} & names.keys():
                cases[name].append(item)
    return cases


def spaced(count, kept):
    """Return ``kept`` places of ``count``, evenly spaced, the first among them."""
    kept = min(kept, count)
    return {place * count // kept for place in range(kept)}

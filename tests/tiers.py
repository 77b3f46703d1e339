"""Which tests take too long for their tier: some of their cases stay, the others are of the next one.

Seconds are of one core, all cases together. A test that is not named here is of the tier that its own
marks say.
"""

from collections import defaultdict

import pytest

from sampling import drawn

QUICK = {
    "accounting/test_flops_methods.py::test_a_round_of_a_method_against_torch": 1,  # 10 s
    "accounting/test_quantities.py::test_thousands_are_written_in_one_way": 0,
    "accounting/test_traffic.py::test_measured_is_the_closed_form": 11,  # 33 s
    "commands/test_api.py::test_a_table_is_compared": 0,  # 6 s
    "commands/test_api.py::test_progress_is_shown_when_asked_for": 0,
    "commands/test_api.py::test_what_a_function_raises_ends_a_run_that_goes_on": 1,
    "commands/test_commands.py::test_a_benchmark_from_adapters_to_page": 0,
    "commands/test_commands.py::test_evaluate_and_report": 0,  # 6 s
    "commands/test_early_checks.py::test_a_mistake_is_told_in_the_words_of_the_check_and_what_is_right_passes": 0,
    "commands/test_early_checks.py::test_a_module_of_the_user_that_needs_what_is_absent_is_not_refused": 0,
    "deployment/test_equality.py::test_simulation_and_machines_give_the_same": 1,  # 16 s
    "deployment/test_faults.py::test_a_bad_answer_is_left_out_with_the_reason": 3,  # 31 s
    "deployment/test_faults.py::test_a_file_of_all_clients_can_be_dealt_as_a_simulation_deals_it": 0,
    "deployment/test_faults.py::test_a_model_of_the_clients_own_is_written_on_its_own_machine": 0,
    "deployment/test_faults.py::test_no_tensor_of_a_personal_part_is_in_any_message": 0,
    "deployment/test_flower_fleet.py::test_what_no_honest_client_sends_is_an_offence_of_its_kind": 4,
    "deployment/test_malformed.py::test_the_same_client_twice_counts_once": 0,
    "deployment/test_private_rows.py::test_a_simulation_of_a_file_for_each_client_has_the_bits_of_clients_with_rows_of_their_own": 1,
    "deployment/test_row_privacy.py::test_a_budget_holds_over_runs_and_coordinators": 0,  # 7 s
    "engines/flower/test_attribution.py::test_what_befalls_an_honest_client_is_no_offence": 1,
    "engines/flower/test_attribution.py::test_where_nobody_is_proven_only_what_is_signed_for_the_question_is_an_offence": 0,
    "engines/test_cohorts.py::test_a_cohort_repeats_to_the_bit_and_goes_on_after_a_stop": 0,
    "engines/test_cohorts.py::test_a_method_gives_the_same_whether_clients_are_trained_together": 2,
    "engines/test_too_little_memory.py::test_the_rest_of_the_run_is_that_of_smaller_passes": 0,  # 8 s
    "engines/test_workers.py::test_any_order_of_answers_and_any_death_give_the_bits_of_one_process": 1,
    "engines/test_workers.py::test_more_workers_than_memory_are_refused_with_the_number_that_fits": 0,
    "federation/test_admission.py::test_between_machines_a_claim_of_2_to_the_40_rows_is_cut_unless_any_is_allowed": 0,
    "federation/test_admission.py::test_no_honest_client_is_over_a_generous_bound": 2,  # 10 s
    "federation/test_compressed_exchange.py::test_bytes_fall_and_the_loss_does_not_rise": 1,
    "federation/test_compressed_exchange.py::test_control_variates_have_no_error_feedback": 1,
    "federation/test_compressed_exchange.py::test_factors_of_any_rank_are_coded": 1,
    "federation/test_reported.py::test_all_that_honest_clients_report_is_declared_and_let_in": 3,
    "federation/test_server_memory.py::test_what_waits_on_disk_gives_the_same_bits": 0,
    "methods/contract/test_unseen_clients.py::test_they_are_in_no_round_and_judged_twice": 2,  # 13 s
    "methods/test_aggregation_rules.py::test_every_method_that_averages_knows_the_rules": 1,  # 8 s
    "methods/test_aggregation_rules.py::test_one_attacker_of_five_moves_the_mean_far_and_no_robust_rule": 2,
    "methods/test_distillation.py::test_all_logits_equal_the_k_likeliest_of_all": 0,
    "methods/test_distillation.py::test_every_rule_is_another": 0,
    "methods/test_distillation.py::test_no_parameter_travels": 2,  # 12 s
    "methods/test_fedamole.py::test_a_reply_that_does_not_fit_leaves_its_client_out": 1,  # 13 s
    "methods/test_fedamole.py::test_ablations_draw_in_every_round_or_once": 0,
    "methods/test_fedamole.py::test_gaussian_noise_is_as_large_as_is_promised": 0,
    "methods/test_fedamole.py::test_newcomers_get_all_experts": 0,
    "methods/test_fedpdpo.py::test_alternating_trains_either_part_with_the_other_frozen": 0,
    "methods/test_fedpdpo.py::test_nothing_personal_is_in_any_payload": 1,
    "methods/test_personalised.py::test_clients_are_judged_by_what_they_would_use": 3,  # 9 s
    "methods/test_reveals.py::test_replies_hold_what_it_says": 3,  # 8 s
    "methods/test_reveals.py::test_what_is_not_allowed_is_not_computed_and_nothing_is_kept": 4,  # 5 s
    "methods/test_split.py::test_gradients_that_blow_the_server_up_leave_their_client_out": 2,  # 5 s
    "methods/test_split.py::test_one_client_is_centralised_training_bit_for_bit": 5,  # 15 s
    "models/test_heads.py::test_flops_are_those_torch_counts": 10,  # 6 s
    "models/test_own_code.py::test_every_call_of_a_loader_says_so": 0,
    "models/test_quantize.py::test_dpo_and_kto_train_on_it_and_the_adapter_scores_the_same": 0,
    "models/test_split_model.py::test_every_cut_gives_the_whole_models_loss_and_gradients": 5,  # 12 s
    "recipes/test_recipes.py::test_recipe": 2,  # 19 s
    "reports/test_comparison_sections.py::test_runs_say_which_sections_there_are_beside_the_one_that_was_asked_for": 0,
    "reports/test_doubts.py::test_every_comparison_shows_and_tells_them": 0,
    "reports/test_judged.py::test_a_headline_has_colour_only_where_the_change_is_shown": 0,
    "reports/test_judged.py::test_comparisons_of_few_seeds_say_what_is_missing": 0,
    "reports/test_run_page.py::test_a_page_says_what_became_of_pairs": 0,
    "runs/privacy_audit/test_audit.py::test_an_adapter_that_repeats_its_rows_is_found_out": 0,
    "runs/test_benchmarks.py::test_a_real_adapter_answers_and_the_key_is_nowhere": 0,
    "runs/test_benchmarks.py::test_the_three_benchmarks_end_to_end": 2,  # 8 s
    "runs/test_comparison.py::test_a_grid_is_run_once_and_reported": 0,  # 17 s
    "runs/test_cost_estimate.py::test_what_is_advised_is_what_a_run_does": 2,  # 14 s
    "runs/test_export.py::test_a_classifier_of_a_source_object_has_its_classes": 0,  # 13 s
    "runs/test_export.py::test_a_plain_run_exports_its_global_model": 1,  # 10 s
    "runs/test_profiling.py::test_a_profiled_run_leaves_a_trace_and_the_same_adapter": 0,  # 10 s
    "runs/test_profiling.py::test_a_resumed_run_has_a_trace_of_its_own": 0,
    "runs/test_run.py::test_every_method_is_judged_on_every_clients_own_rows": 2,  # 11 s
    "runs/test_run.py::test_every_objective_runs_under_every_method": 15,  # 50 s
    "runs/test_run.py::test_interrupted_and_resumed_equals_uninterrupted": 0,
    "runs/test_run.py::test_one_client_equals_centralised_bit_for_bit": 2,  # 17 s
    "runs/test_streaming.py::test_an_adapter_is_that_of_rows_in_memory": 0,  # 8 s
    "security/test_audit_log.py::test_a_resumed_run_goes_on_with_its_log": 0,
    "test_examples.py::test_example": 0,  # 5 s, and 33 s to train the tiny model
    "test_mutants.py::test_every_part_has_modules_and_every_module_tests": 0,
    "test_public.py::test_python_in_the_readme_runs": 0,
    "test_words.py::test_every_exception_is_still_needed": 0,
    "training/test_budgets.py::test_a_budget_is_what_a_client_computes": 0,
    "training/test_steps.py::test_every_objective_learns": 1,  # 12 s
}
"""How many cases of a test stay in the default suite, evenly spaced; the others are slow."""

SLOW = {
    "accounting/test_flops_methods.py::test_a_round_of_a_method_against_torch": 10,
    "accounting/test_traffic.py::test_measured_is_the_closed_form": 14,
    "deployment/test_absences.py::test_a_round_without_a_member_says_without_whom_and_why": 10,
    "deployment/test_chaos.py": 0,  # 12 minutes
    "deployment/test_deaths.py": 4,  # 35 s each
    "deployment/test_equality.py::test_simulation_and_machines_give_the_same": 10,  # 5 s each
    "deployment/test_kills.py": 1,  # 3 minutes each
    "deployment/test_members_lives.py": 5,  # 40 s each
    "deployment/test_methods_on_machines.py": 1,
    "deployment/test_releases.py": 1,
    "deployment/test_slow_link.py": 0,  # 2 minutes
    "engines/test_ray.py": 1,  # 2 minutes each
    "experiment/test_mistakes.py::test_a_mistake_is_one_message_at_once": 100,
    "federation/test_secure_memory.py": 1,  # a minute each
    "methods/test_distillation.py::test_mixed_clients_know_more_than_each_by_itself": 0,
    "methods/test_reveals.py::test_no_request_takes_more_batches_than_it_says": 10,
    "methods/test_reveals.py::test_replies_hold_what_it_says": 10,
    "privacy/test_accounting.py::test_the_table_of_noise_for_a_target": 4,  # 7 s each
    "recipes/test_recipes.py::test_comparison_of_personal_models": 1,
    "reports/sections/test_costs.py::test_a_grid_to_its_page": 0,
    "runs/test_private_messages.py::test_but_for_noisy_sums_nothing_depends_on_rows": 12,  # 3 s each
    "runs/test_private_messages.py::test_under_secure_aggregation_answers_are_masked_whole": 6,
    "runs/test_run.py::test_any_objective_interrupted_and_resumed_equals_uninterrupted": 3,
    "runs/test_run.py::test_every_method_is_judged_on_every_clients_own_rows": 8,
    "runs/test_run.py::test_every_objective_runs_under_every_method": 24,
    "runs/test_run.py::test_interrupted_and_resumed_equals_uninterrupted": 3,
    "runs/test_run.py::test_one_client_equals_centralised_bit_for_bit": 3,
    "security/test_one_port.py::test_flowers_command_line_gets_no_answer": 12,  # 3 s each
    "test_docs.py::test_python_on_the_page_about_the_command_line_runs": 0,
    "test_guides.py::test_the_page_of_reproducibility": 0,
}
"""How many cases of a slow test, or of a file's slow tests, stay so, drawn by the commit's hash; the others
are of the full suite."""


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

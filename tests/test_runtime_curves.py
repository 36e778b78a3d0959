"""When something forms in a run, and the pictures of it."""

from runtime.curves import at_the_end, formed, onset


def rows(*values, every=100):
    return [{"step": i * every, "tokens": i, "x": v} for i, v in enumerate(values)]


def test_onset_is_the_first_of_two_consecutive_evaluations_at_or_above_the_threshold():
    assert onset(rows(0, 0.1, 0.5, 0.6, 0.2), 0.5, "x") == 200
    assert onset(rows(0, 0.9, 0.1, 0.5, 0.5), 0.5, "x") == 300  # one alone may be chance
    assert onset(rows(0, 0.9, 0.1, 0.5, 0.5), 0.5, "x", axis="tokens") == 3
    assert onset(rows(0.7, 0.7), 0.5, "x") == 0
    assert onset(rows(0, 0, 0.9), 0.5, "x") is None and onset([], 0.5, "x") is None
    assert onset([{"step": 0}, *rows(None, 0.6, 0.6)], 0.5, "x") == 100  # rows that lack it are no evaluations


def test_the_end_is_the_last_fifth():
    assert at_the_end(rows(*range(10)), "x") == 8.5 and at_the_end(rows(3.0), "x") == 3.0


def test_what_forms_on_the_way_to_copying_is_found_in_its_order():
    run = [
        {"step": s, "tokens": 10 * s, "previous_max": 0.1 * s, "induction_max": 0.05 * s, "copy_token_full": 0.04 * s,
         "copy_token_top128": 0.0} for s in range(10)
    ]  # fmt: skip
    assert formed(run) == {"previous-token head": 50, "induction head": 60}
    assert formed([{k: v for k, v in row.items() if "top" not in k} for row in run])["copying"] == 80
    assert formed([{"step": 1, "tokens": 1, "val_loss": 3.0}]) == {}

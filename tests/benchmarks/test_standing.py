"""How the ten-shot benchmark compares methods, on made-up runs whose answers are known."""

import xml.etree.ElementTree as ET

import fronts
import pytest
import standing
from standing import at_variety, best_of_each, dominance, equal_variety, kid_within, tables

REAL, SOURCE = {"kid": 0.0, "intra_lpips": 0.4, "copy_rate": 0.01}, {"kid": 100.0, "intra_lpips": 0.5, "copy_rate": 0.0}


def row(name, step, kid, intra, seed=0, domain="ink", **others):
    known = {"copy_rate": 0.0, "unadapted_rate": 0.0, "fid": 1.0, "nearest_lpips": 0.3, "seconds": 2.0 * step}
    return (
        {"domain": domain, "name": name, "seed": seed, "step": step, "kid": kid, "intra_lpips": intra} | known | others
    )


def anchors(domain="ink"):
    real = row("real", 0, **{"kid": 0.0, "intra": 0.4}, domain=domain) | REAL | {"intra_lpips_error": 0.01}
    source = row("source", 0, 100.0, 0.5, domain=domain) | SOURCE
    for anchor in (real, source):
        del anchor["seconds"]
    source["unadapted_rate"] = None
    return [real, source]


DEFAULT_RUN = [row("studio", 100, 60.0, 0.42), row("studio", 200, 40.0, 0.38), row("studio", 300, 30.0, 0.3)]
OTHER_RUN = [row("finetune", 100, 70.0, 0.41), row("finetune", 200, 50.0, 0.35), row("finetune", 300, 20.0, 0.3)]


def test_numbers_between_two_checkpoints_are_interpolated():
    point = at_variety(DEFAULT_RUN, 0.39)
    assert point is not None
    assert (point["step"], point["kid"], point["seconds"]) == pytest.approx((175, 45, 350))


def test_it_is_where_variety_falls_last():
    run = [row("a", 1, 9.0, 0.5), row("a", 2, 8.0, 0.3), row("a", 3, 7.0, 0.5), row("a", 4, 5.0, 0.3)]
    point = at_variety(run, 0.4)
    assert point is not None
    assert point["kid"] == pytest.approx(6)
    assert at_variety(run, 0.5)["step"] == 3
    assert at_variety(run, 0.3) is None  # never below
    assert at_variety(run, 0.6) is None  # never so much


def test_what_one_end_does_not_know_is_not_made_up():
    _, source = anchors()
    point = at_variety([source, row("a", 10, 50.0, 0.3)], 0.4)
    assert point is not None
    assert "unadapted_rate" not in point
    assert point["kid"] == pytest.approx(75)


def test_the_lowest_kid_with_no_larger_gap():
    rows = [*anchors(), *DEFAULT_RUN]
    assert kid_within(rows, "studio", 0.01) == pytest.approx(45)
    assert kid_within(rows, "studio", 0.2) == 30  # never so low: its end
    copying = [*anchors(), *DEFAULT_RUN[:2], DEFAULT_RUN[2] | {"copy_rate": 0.04}]
    assert kid_within(copying, "studio", 0.2) == 40
    high = [*anchors(), row("studio", 100, 60.0, 0.45)]
    assert kid_within(high, "studio", 0.01) is None  # nothing is known that near
    assert kid_within(high, "studio", 0.06) == 60


def test_the_lowest_kid_is_a_mean_over_seeds():
    other = [row("studio", 100, 62.0, 0.42, seed=1), row("studio", 200, 42.0, 0.38, seed=1)]
    assert kid_within([*anchors(), *DEFAULT_RUN, *other], "studio", 0.01) == pytest.approx(46)


def test_dominated_are_those_with_a_higher_kid_at_that_gap():
    count, undominated = dominance([*anchors(), *DEFAULT_RUN, *OTHER_RUN])
    assert count == 3
    assert len(undominated) == 1
    assert "`finetune` @ 300 (20.0 / 0.100; `studio` 30.0)" in undominated[0]


def test_checkpoints_that_copy_are_not_compared():
    copying = [OTHER_RUN[0], *(made | {"copy_rate": 0.5} for made in OTHER_RUN[1:])]
    assert dominance([*anchors(), *DEFAULT_RUN, *copying]) == (1, [])


def test_the_best_checkpoint_weighs_likeness_and_variety():
    best = best_of_each([*anchors(), *DEFAULT_RUN, *OTHER_RUN])
    assert best["studio"][0] == 200  # .4 + .05
    assert best["finetune"][0] == 300  # .2 + .25


def test_the_table_says_of_how_many_seeds_it_speaks():
    short = [row("studio", 100, 60.0, 0.42, seed=1)]
    lines = equal_variety([*anchors(), *DEFAULT_RUN, *short])
    assert lines[-1].startswith("| `studio` | 50.0 | 0.0 % | 0.0 % | 150 | 1 of 2 |")


@pytest.fixture
def results():
    return [made | {"domain": domain} for domain in fronts.TITLES for made in (*anchors(), *DEFAULT_RUN, *OTHER_RUN)]


def test_tables_of_all(results):
    text = tables(results)
    assert text.count("At equal variety") == len(fronts.TITLES)
    assert "Of 15 honest checkpoints of the other methods `studio` dominates 10" in text


def test_a_part_of_the_plan_has_tables_and_a_picture_too(tmp_path):
    rows = [*anchors(), *OTHER_RUN]
    assert "Best checkpoint against best checkpoint" not in tables(rows)  # the default was not measured
    fronts.draw(rows, tmp_path / "a.svg")
    shown = "".join(ET.parse(tmp_path / "a.svg").getroot().itertext())
    assert "ink (far style)" in shown
    assert "grey" not in shown


def test_the_picture_names_all_and_depends_on_the_rows_alone(results, tmp_path):
    for name in ("a.svg", "b.svg"):
        fronts.draw(results, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    shown = "".join(ET.fromstring(text).itertext())
    for name in (*fronts.TITLES.values(), *(label for _, label in fronts.COLOURS.values())):
        assert name in shown
    assert set(fronts.COLOURS) == {*standing.METHODS, standing.PAPER}

import math
import re

import pytest
import torch

from domainstudio.evaluation.charts import line_charts
from domainstudio.evaluation.report import ReportEntry, write_report
from domainstudio.evaluation.verdict import judge
from domainstudio.evaluation.watch import Reading

NUMBERS = ("kid", "intra_lpips", "copy_rate", "unadapted_rate", "num_images")
SCORES = {"num_images": 1000, "fid": 70.0, "nearest_lpips": 0.2, "copy_threshold": 0.07}


def entry(title, kind="result", count=4, **more):
    metrics = {key: more.pop(key) for key in NUMBERS if key in more}
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    metrics = {**SCORES, **metrics, **more.pop("metrics", {})} if metrics else more.pop("metrics", {})
    return ReportEntry(title, f"What {title} is.", images, metrics, kind, **more)


REAL = entry("Real pictures", "real", kid=0.5, intra_lpips=0.20, copy_rate=0.01)
SOURCE = entry("Source", "source", kid=195.0, intra_lpips=0.38, copy_rate=0.0)
COPIER = entry("Copier", "copier", kid=16.0, intra_lpips=0.0, copy_rate=1.0)
PLAIN = entry("Plain", kid=52.0, intra_lpips=0.12, copy_rate=0.01)
OURS = entry("Ours", kid=41.0, intra_lpips=0.19, copy_rate=0.0)
COPYING = entry("Plain", kid=33.0, intra_lpips=0.03, copy_rate=0.23)


@pytest.fixture
def page(tmp_path):
    def write(*entries, title="Run", summary="A run.", details=None):
        path = tmp_path / "runs" / "report.html"
        training = torch.zeros(10, 3, 16, 16)
        write_report(path, title=title, summary=summary, training=training, entries=entries, details=details or {})
        return path.read_text(encoding="utf-8")

    return write


def verdict(*entries):
    result = judge(entries, 10)
    return result.headline, " ".join(text for _, text in result.findings).replace("\u00a0", " ")


class TestVerdict:
    def test_ours_better(self):
        headline, findings = verdict(SOURCE, PLAIN, OURS, COPIER, REAL)
        assert headline == "Ours is closest to the real pictures, in likeness and in diversity."
        assert "Ours: KID 41, diversity 0.19 (real pictures: 0.20), 0 % copies." in findings
        assert (
            "Plain: KID 52, diversity 0.12 (real pictures: 0.20), 1 % copies. Its pictures are clearly less" in findings
        )

    def test_ours_worse(self):
        worse = entry("Ours", kid=110.0, intra_lpips=0.31, copy_rate=0.0)
        headline, findings = verdict(SOURCE, entry("Plain", kid=52.0, intra_lpips=0.19, copy_rate=0.01), worse, REAL)
        assert headline == "Plain is closest to the real pictures, in likeness and in diversity."
        assert "more varied than real ones" in findings

    def test_each_better_at_one_thing(self):
        headline, _ = verdict(PLAIN, entry("Ours", kid=60.0, intra_lpips=0.2, copy_rate=0.0), REAL)
        assert headline == "Plain looks most like the real pictures; Ours comes closest to their diversity."

    def test_differences_within_their_errors_are_level(self):
        def headline(kid_error: float, intra_error: float) -> str:
            errors = {"kid_error": kid_error, "intra_lpips_error": intra_error}
            ours, other = (
                entry(title, kid=kid, intra_lpips=intra, copy_rate=0.0, metrics=errors)
                for title, kid, intra in (("Ours", 41.0, 0.19), ("Other", 45.0, 0.186))
            )
            return verdict(ours, other, REAL)[0]

        assert headline(2.9, 0.003) == "Ours and Other are level, in likeness and in diversity."
        assert headline(2.8, 0.003).startswith("Ours looks most like the real pictures; Ours and Other are equally")
        assert headline(2.9, 0.002).endswith("Ours comes closest to their diversity.")
        assert headline(0, 0) == "Ours is closest to the real pictures, in likeness and in diversity."

    def test_a_copying_result_never_wins(self):
        headline, findings = verdict(SOURCE, COPYING, OURS, REAL)
        assert headline == "Ours is the only adapted model that does not copy."
        assert (
            "Plain hands back training pictures: 23 % of its samples are closer to one of the ten than 99 in 100 real "
            "pictures are. That flatters its KID (33), which is set aside." in findings
        )

    def test_all_copy(self):
        assert verdict(COPYING, COPYING, REAL)[0] == "Every adapted model hands back training pictures."

    def test_copying_is_judged_by_the_number_of_images(self):
        assert verdict(entry("Ours", kid=41.0, copy_rate=0.05), REAL)[0] == "Ours hands back training pictures."
        headline, findings = verdict(entry("Ours", kid=41.0, copy_rate=0.05, num_images=20), REAL)
        assert headline == "Ours does not copy."
        assert "Only 20 images were measured" in findings

    def test_copying_unmeasured_is_said(self):
        headline, findings = verdict(PLAIN, entry("Ours", kid=30.0, intra_lpips=0.2, copy_rate=None), REAL)
        assert headline.endswith("not every model was checked for copying.")
        assert "copying not measured" in findings

    def test_worse_than_the_source_is_said(self):
        headline, findings = verdict(SOURCE, entry("Ours", kid=200.0), REAL)
        assert headline == "Ours is no closer to the domain than the source before training."
        assert "Its KID is no better than that of the source before training." in findings
        headline, _ = verdict(SOURCE, COPYING, entry("Ours", kid=200.0, copy_rate=0.0), REAL)
        assert headline == "No model without copies is closer to the domain than the source before training."

    def test_pictures_left_in_the_source_do_not_count_as_diversity(self):
        left = entry("Ours", kid=41.0, intra_lpips=0.2, copy_rate=0.0, unadapted_rate=0.24)
        headline, findings = verdict(SOURCE, PLAIN, left, REAL)
        assert headline == "Ours looks most like the real pictures."
        assert "24 % of them still look like the source's, which flatters its diversity" in findings
        headline = verdict(left, REAL)[0].replace("\u00a0", " ")
        assert headline == "Ours does not copy, but 24 % of its pictures still look like the source's."
        few = entry("Ours", kid=41.0, intra_lpips=0.2, copy_rate=0.0, unadapted_rate=0.05)
        assert verdict(few, REAL)[0] == "Ours does not copy."
        assert "look like the source's" not in verdict(few, REAL)[1]

    def test_no_reference(self):
        headline, findings = verdict(PLAIN, OURS)
        assert headline == "Ours looks most like the real pictures."
        assert "No held-out real pictures were given" in findings
        assert "than the copy threshold allows" in verdict(COPYING)[1]

    def test_no_metrics(self):
        headline, findings = verdict(entry("Ours"), entry("Plain"))
        assert headline.startswith("Nothing was measured")
        assert "Ours: nothing was measured." in findings

    @pytest.mark.parametrize("entries", [(), (REAL,), (SOURCE, COPIER, REAL)])
    def test_nothing_adapted(self, entries):
        assert verdict(*entries) == ("There is no adapted model to judge: only anchors are shown.", "")


class TestCharts:
    def test_one_line_a_term_and_few_points(self):
        rows = [{"step": s, "loss": 2.0 / (s + 1), "denoising": 1.0, "pairwise": -0.1 * s} for s in range(5000)]
        drawn = line_charts(rows)
        assert drawn.count("<polyline") == 3
        assert drawn.index(">loss") < drawn.index(">denoising") < drawn.index(">pairwise")
        assert drawn.count("log scale") == 1
        assert len(drawn) < 40_000
        assert "nan" not in drawn

    @pytest.mark.parametrize(
        ("values", "lines"),
        [([], 0), ([math.nan], 0), ([0.5], 1), ([0.0, 0.0], 1), ([1.0, math.inf, 2.0], 1), ([1e-9, 1e9], 1)],
    )
    def test_odd_series(self, values, lines):
        drawn = line_charts([{"step": step, "loss": value} for step, value in enumerate(values)])
        assert drawn.count("<polyline") == lines
        assert "nan" not in drawn
        assert "inf" not in drawn

    def test_terms_may_start_late(self):
        assert line_charts([{"step": 0, "loss": 1.0}, {"step": 1, "loss": 1.0, "late": 2.0}]).count("<polyline") == 2


class TestPage:
    def test_needs_nothing_but_itself(self, page):
        html = page(SOURCE, OURS, REAL)
        assert set(re.findall(r'(?:src|href)="(data:image/webp;base64,)?', html)) == {"data:image/webp;base64,"}
        assert not re.search(r"https?://|url\(|@import|<script|<link", html)
        assert "$" not in html

    def test_escapes_everything(self, page):
        bad = '<i>"&'
        protocols = {"kid": None, "fid_protocol": bad, "reasons": {"kid": bad}}
        odd = entry(bad, metrics=protocols, losses=({"step": 0, bad: 1.0},), previews=((1, torch.zeros(2, 3, 8, 8)),))
        html = page(odd, title=bad, summary=bad, details={bad: bad, "command": bad})
        assert "<i>" not in html
        assert html.count("&lt;i&gt;&quot;&amp;") >= 10

    def test_missing_numbers_say_why(self, page):
        html = page(entry("Ours", metrics={"kid": None, "fid": math.nan, "reasons": {"kid": "no held-out pictures"}}))
        assert "–<sup>1</sup>" in html
        assert '<ol class="reasons"><li>no held-out pictures</li><li>not measured</li></ol>' in html

    def test_numbers_of_a_copier_are_struck_out(self, page):
        html = page(COPYING, OURS, COPIER, REAL)
        assert html.count("<s>") == 4
        assert html.count('class="flag"') == 2
        assert "<small>−0.170</small>" in html

    def test_numbers_have_their_standard_errors(self, page):
        errors = {"kid_error": 3.21, "intra_lpips_error": 0.0123}
        html = page(REAL, entry("Ours", kid=41.0, intra_lpips=0.19, copy_rate=0.0, metrics=errors))
        assert ">41<small>±\u00a03.2</small><" in html
        assert ">0.190<small>±\u00a00.012</small><small>−0.010</small><" in html

    def test_protocols_that_differ_are_told_apart(self, page):
        same, other = ({"kid": 1.0, "kid_protocol": text} for text in ("50 subsets", "10 subsets"))
        assert "KID ×10³: 50 subsets<" in page(entry("A", metrics=same), entry("B", metrics=same))
        assert "do not compare: 50 subsets (A); 10 subsets (B)" in page(
            entry("A", metrics=same), entry("B", metrics=other)
        )

    def test_notes_are_shown_once(self, page):
        html = page(*(entry(title, metrics={"kid": 1.0, "notes": ("A rule of thumb.",)}) for title in "AB"))
        assert html.count("A rule of thumb.") == 1

    def test_nearest_pictures_closest_first_and_copies_marked(self, page):
        html = page(entry("Ours", kid=41.0, nearest=(3, 1, 0, 2), distances=(0.3, 0.05, 0.2, 0.1)))
        assert re.findall(r"<figcaption>(0\.\d+)", html) == ["0.050", "0.100", "0.200", "0.300"]
        assert html.count('class="pair copy"') == 1
        assert "1 of 4 (25\u00a0%) within the copy threshold of 0.070." in html

    def test_same_noise_in_columns(self, page):
        html = page(entry("Source", "source", count=14), entry("Ours", count=3), REAL)
        row = html[html.index('class="noise"') :]
        assert re.findall(r'alt="(\w+), noise (\d+)"', row) == [
            (t, str(k)) for t in ("Source", "Ours") for k in (1, 2, 3)
        ]

    def test_previews_are_thinned(self, page):
        previews = tuple((step, torch.zeros(8, 3, 16, 16)) for step in range(0, 5000, 100))
        html = page(entry("Ours", previews=previews))
        assert html.count('class="frame"') == 10
        assert "<figcaption>4,900</figcaption>" in html

    def test_stays_small_with_large_noisy_pictures(self, page):
        noise, step = torch.rand(20, 3, 192, 192) * 2 - 1, torch.rand(3, 3, 192, 192) * 2 - 1
        noisy = ReportEntry("A", "", noise, {}, nearest=(0,) * 20, distances=(0.1,) * 20, previews=((1, step),) * 10)
        assert len(page(noisy)) < 2_000_000  # noise is the dearest picture there is

    def test_as_little_as_possible(self, page):
        html = page(entry("Ours", count=0))
        assert "Over training" not in html
        assert "Same noise" not in html
        assert "Nothing was measured" in html

    def test_commands_become_how_to_reproduce(self, page):
        html = page(OURS, details={"Seed": "0", "Command": "domainstudio train ink.toml"})
        assert "<pre><code>domainstudio train ink.toml</code></pre>" in html
        assert '<th scope="row">Seed</th><td>0</td>' in html

    def test_lists_that_do_not_match_the_images_are_refused(self):
        with pytest.raises(ValueError, match="2 nearest for 4 images"):
            entry("Ours", nearest=(0, 1))


class TestMoreNumbers:
    def test_what_is_measured_is_folded_below(self, page):
        html = page(entry("A", metrics={"vendi": 7.25, "coverage": 0.5}), entry("B", metrics={"vendi": 9.0}))
        more = html[html.index("<details>") : html.index("</details>")]
        assert re.findall(r"<th scope=.col.>([^<]*)</th>", more) == ["Model", "Coverage", "Vendi"]
        assert ">0.500<" in more
        assert ">7.2<" in more
        assert "–<sup>" in more  # B's coverage

    def test_nothing_is_folded_where_nothing_is_measured(self, page):
        assert "<details>" not in page(PLAIN, OURS)


class TestWatched:
    def test_the_sentence_and_the_curves_are_shown(self, page):
        readings = tuple(Reading(step, 1.5 - step / 100, 1.0, 0.4, 0.1, (2,)) for step in (0, 50, 100))
        html = page(entry("A", losses=({"step": 1, "loss": 0.5},), readings=readings))
        assert "From step 100 on, outputs collapse onto picture 2; step 50 is the best." in html
        shown = html[html.index("From step 100 on") :]
        for title in ("closeness (1 is right)", "diversity (1 is right)", "style distance", "drift"):
            assert f'aria-label="{title} from' in shown
        assert 'aria-label="loss from' in shown
        assert shown.count('class="mark"') == 4  # the best step, in the curves of the watch alone

    def test_an_unwatched_run_says_nothing_of_it(self, page):
        assert "closeness" not in page(entry("A", losses=({"step": 1, "loss": 0.5},)))

"""How an interval follows from cues, by hand; that every rule of the package can be read; who has one."""

from __future__ import annotations

import dataclasses
import math

import pytest

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.config import build
from monai_deepgmm.patients import discovery
from monai_deepgmm.phantom import heart as phantom
from monai_deepgmm.results import interval_rule, uncertainty
from monai_deepgmm.results.cues import Cues
from monai_deepgmm.results.interval_rule import IntervalRule, rules
from monai_deepgmm.results.page import page
from monai_deepgmm.results.segment import segment
from monai_deepgmm.results.segmentation import Segmentation

SEQUENCES = ("LGE", "T2", "bSSFP")
RULE = IntervalRule(0.1, {"noise": (0.2, 1.0, 0.5), "expected": (-0.1, 0.0, 1.0)}, "edema", (0.05, 0.15), (0.2, 0.6))


def told(noise: float | None = None, expected: float = 0.0, doubt_ml: float = 0.0) -> Cues:
    own = {"scar": {"expected": expected}, "edema": {"doubt_ml": doubt_ml}}
    return Cues({} if noise is None else {"noise": noise}, own)


@pytest.mark.parametrize(
    ("cues", "middle", "reach"),
    [
        (told(), 0.1, 0.2),  # what is not known counts as usual
        (told(noise=1.5), 0.3, 0.2),
        (told(noise=99.0), 0.1 + 0.2 * 3, 0.2),  # at most three standard deviations
        (told(noise=1.0, expected=2.0), -0.1, 0.2),
        (told(doubt_ml=0.1 * 20), 0.1, 0.4),
        (told(doubt_ml=0.9 * 20), 0.1, 0.6),
    ],
)
def test_the_ends_by_hand(cues, middle, reach):
    wanted = [19.5 * math.exp(middle + sign * reach) - 0.5 for sign in (-1, 1)]
    assert RULE.ends_ml("scar", 19.0, cues) == pytest.approx(wanted)


def test_of_what_was_not_found_the_rule_says_how_much_there_may_be():
    absent = dataclasses.replace(RULE, absent_ml=7.0)
    assert absent.ends_ml("scar", 0.0, told(noise=9.0)) == (0.0, 7.0)
    assert absent.ends_ml("scar", 1.0, told()) == RULE.ends_ml("scar", 1.0, told())


def test_where_nothing_is_infarcted_the_interval_of_edema_begins_at_zero():
    edema, none = dataclasses.replace(RULE, absent_ml=7.0), Cues({"present": 0.0}, {})
    for rule, cues, begins in ((edema, none, True), (RULE, none, False), (edema, Cues({"present": 1.0}, {}), False)):
        low, high = rule.ends_ml("edema", 19.0, cues)
        assert (low == 0) == begins
        assert high > 19


def test_an_interval_by_a_rule_holds_the_volume_and_stays_in_the_mask(monkeypatch):
    monkeypatch.setattr(interval_rule, "rules", lambda *_: {"scar": RULE})
    names, volumes = ["blood", "scar"], [30.0, 19.0]
    for noise, inside in ((99.0, 19.0), (-99.0, 19.0)):
        _, scar = uncertainty.intervals(
            names, volumes, [1.0, 1.0], told(noise=noise, doubt_ml=9.0), of=("infarct", "anatomy"), sequences=SEQUENCES
        )
        assert 0 <= scar.low_ml <= inside <= scar.high_ml <= 49.0


def test_without_cues_or_a_rule_the_standard_deviation_counts(monkeypatch):
    monkeypatch.setattr(interval_rule, "rules", lambda *_: {"scar": RULE})
    about = (["blood", "scar"], [30.0, 19.0], [2.0, 1.0])
    how = {"of": ("infarct", "anatomy"), "sequences": SEQUENCES}
    by_sd = uncertainty.intervals(*about, None, **how)
    reach = uncertainty.reach("infarct", "anatomy", "blood")
    assert by_sd[0] == uncertainty.interval(30.0, 2.0, reach, mask_ml=49.0)
    ruled = uncertainty.intervals(*about, told(), **how)
    assert ruled[0] == by_sd[0]
    assert ruled[1] != by_sd[1]


@pytest.mark.parametrize("sequences", [SEQUENCES, ("LGE", "T2"), ("LGE",), ("LGE", "bSSFP")])
def test_every_visible_tissue_has_a_rule_with_late_enhancement(sequences):
    found = rules("infarct", "anatomy", sequences)
    assert set(found) == {t.name for t in protocol.load("infarct").visible(sequences)}
    for rule in found.values():
        assert 0 < rule.reach[0] <= rule.reach[1]
        assert rule.at[0] < rule.at[1]
        assert all(sd > 0 for _, _, sd in rule.cues.values())


def test_the_network_taught_by_a_method_has_its_rules():
    assert rules("infarct", "cohort", SEQUENCES) == rules("infarct", "anatomy", SEQUENCES)


def test_elsewhere_there_is_none():
    assert rules("infarct", "anatomy", ("T2",)) == {}
    assert rules("infarct", "gmm", SEQUENCES) == rules("brain", "pvgmm", ("T1",)) == {}


def test_more_doubt_makes_an_interval_wider():
    rule = rules("infarct", "anatomy", SEQUENCES)["myocardium"]
    widths = []
    for doubt_ml in (0.0, 50.0):
        low, high = rule.ends_ml("myocardium", 80.0, Cues({}, {"edema": {"doubt_ml": doubt_ml}}))
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize(("sequences", "other"), [(SEQUENCES, "anatomy"), (("LGE",), "anatomy"), (("T2",), None)])
def test_svgmm_asks_anatomy_where_that_has_a_rule(sequences, other):
    assert interval_rule.opinion("infarct", "svgmm", sequences) == other
    assert rules("infarct", "svgmm", sequences) == {}
    for method in ("anatomy", "cohort", "gmm"):
        assert interval_rule.opinion("infarct", method, sequences) is None
    assert interval_rule.opinion("brain", "svgmm", sequences) is None


def of_patient(found: Segmentation) -> list[tuple[float | None, float | None]]:
    return [(one.low_ml, one.high_ml) for one in found.intervals]


def test_the_intervals_of_svgmm_are_those_of_anatomy_and_the_page_says_so(tmp_path, monkeypatch):
    phantom.write_cohort(tmp_path, 1, seed=3, config=phantom.PhantomConfig(size=210, slices=(2, 2)))
    (study,) = discovery.find(tmp_path, protocol.load("infarct")).studies
    quick = build(method="svgmm", settings={"max_iter": 3})
    asked, other = segment(study, quick), segment(study, build())
    assert of_patient(asked) == of_patient(other)
    assert asked.sidecar["uncertainty"]["by"] == other.sidecar["uncertainty"]["by"] == "anatomy"
    assert asked.sidecar["uncertainty"]["cues"] == other.sidecar["uncertainty"]["cues"]
    volumes = asked.sidecar["uncertainty"]["volumes"]
    assert volumes["blood"]["volume_ml"] != other.sidecar["uncertainty"]["volumes"]["blood"]["volume_ml"]
    told = [{"tissue": name, **one} for name, one in volumes.items()]
    pages = [page({"patient": "a"}, one.sidecar, told, None) for one in (asked, other)]
    assert ["the one that anatomy gives" in one for one in pages] == [True, False]

    def small(*_, **__):
        raise StudyError("E_MASK_SMALL", "too few voxels", "none")

    monkeypatch.setattr(AnatomicalConfig, "solve_all", small)
    alone = segment(study, quick)
    assert alone.sidecar["uncertainty"]["by"] == "svgmm"
    assert of_patient(alone) != of_patient(other)

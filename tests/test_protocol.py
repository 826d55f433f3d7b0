"""Protocols: the two that come along, a file of one's own, what is visible, and errors that name the key."""

from __future__ import annotations

import copy

import pytest
import yaml

from monai_deepgmm import protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.discovery import find

OWN = yaml.safe_load("""
{name: liver, title: Liver and lesion, unit: volume, mask: liver, sequences: [ADC, T2], normalisation: {crop_mm: null},
 percent_of: {name: liver}, tissues: [
  {name: lesion, index: 7, color: "#ff0000", signature: {ADC: very bright, T2: 0.3}, centrality: 0.5, seen_in: [ADC],
   merges_into: liver},
  {name: liver, index: 2, color: "#00ff00", density_g_per_ml: 1.07, signature: {ADC: dark, T2: grey}, centrality: 0.2,
   seen_in: [ADC, T2]}]}
""")
GONE = object()
LESION = ("tissues", 0)


def own(*keys, to=GONE, raw=OWN):
    """``OWN`` with one value changed or, as it is unless told, taken away."""
    raw = copy.deepcopy(raw)
    *path, last = keys
    place = raw
    for key in path:
        place = place[key]
    if to is GONE:
        del place[last]
    else:
        place[last] = copy.deepcopy(to)
    return raw


#: What ``OWN`` may say besides: an anatomy, for a unit of slices, and evidence that the lesion needs.
SLICED = own("unit", to="slice") | {
    "anatomy": {"inside": ["lesion"], "contrast": {"ADC": 1, "T2": -0.5}, "radius": [0.5, 0.1]}
}
EVIDENCE = {"sequence": "ADC", "size": 4, "score": 1.5, "weights": {"size": 0.2, "support": 1, "contrast": 0.5}}
EVIDENT = own(*LESION, "evidence", to=EVIDENCE)


@pytest.fixture
def load(tmp_path):
    """Reads what is given as a file of one's own."""

    def read(content, name="own.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return protocol.load(path)

    return read


def test_infarct_says_what_to_look_for_where_tissues_are_and_what_they_must_show():
    infarct = protocol.load("infarct")
    assert infarct.sequences == ("LGE", "T2", "bSSFP")
    assert [(t.index, t.name) for t in infarct.tissues] == [(1, "blood"), (2, "myocardium"), (3, "edema"), (4, "scar")]
    assert (infarct.unit, infarct.required, infarct.normalisation) == ("slice", (), "zscore-slice-crop-120mm")
    assert (infarct.percent_name, infarct.percent_of) == ("wall", ("myocardium", "edema", "scar"))
    assert infarct.tissue("myocardium").density_g_per_ml == 1.05
    assert infarct.anatomy.inside == ("blood",)
    assert infarct.anatomy.contrast["T2"] < 0 < infarct.anatomy.contrast["bSSFP"]  # T2 is black-blood
    assert {t.name: t.criteria.sequence for t in infarct.tissues if t.criteria} == {"edema": "T2", "scar": "LGE"}
    assert all(t.seen_in == (t.criteria.sequence,) for t in infarct.tissues if t.criteria)
    wall = [t for t in infarct.tissues if t.name not in infarct.anatomy.inside]
    assert all(set(t.level) == set(infarct.sequences) for t in wall)
    assert sum(t.share for t in wall) == pytest.approx(1)


def test_brain():
    brain = protocol.load("brain")
    assert brain.sequences == ("T1", "T2", "FLAIR")
    assert [(t.index, t.name) for t in brain.tissues] == [(1, "GM"), (2, "WM"), (3, "CSF"), (4, "lesion")]
    assert (brain.required, brain.normalisation) == (("T1",), "zscore-volume-mask")
    assert (brain.percent_name, brain.percent_of) == ("mask", ("GM", "WM", "CSF", "lesion"))
    assert (brain.anatomy, brain.borders) == (None, (("CSF", "GM"), ("GM", "WM")))
    assert brain.anchored == ("GM", "WM")
    assert [t.name for t in brain.components(brain.sequences)] == ["GM", "WM", "CSF"]
    for tissue in brain.tissues:
        assert (tissue.level, tissue.share, tissue.criteria, tissue.density_g_per_ml) == ({}, 1.0, None, None)


@pytest.mark.parametrize("name", protocol.names())
def test_every_protocol_is_sound(name):
    assert protocol.names() == ["brain", "infarct"]
    loaded = protocol.load(name)
    names = {t.name for t in loaded.tissues}
    assert loaded.name == name
    assert set(loaded.required) <= set(loaded.sequences)
    assert set(loaded.percent_of) <= names
    for tissue in loaded.tissues:
        assert set(tissue.signature) == set(loaded.sequences)
        assert set() < set(tissue.seen_in) <= set(loaded.sequences)
        assert tissue.merges_into is None or tissue.merges_into in names - {tissue.name}
        assert tissue.centrality is None or 0 <= tissue.centrality <= 1
        assert len(tissue.color) == 7
    assert loaded.visible(loaded.sequences) == loaded.tissues
    assert loaded.merged(loaded.sequences) == {t.index: t.index for t in loaded.tissues}


@pytest.mark.parametrize(
    ("name", "sequences", "seen", "merged"),
    [
        ("infarct", ["LGE", "T2", "bSSFP"], ["blood", "myocardium", "edema", "scar"], {1: 1, 2: 2, 3: 3, 4: 4}),
        ("infarct", ["LGE", "bSSFP"], ["blood", "myocardium", "scar"], {1: 1, 2: 2, 3: 2, 4: 4}),
        ("infarct", ["T2", "bSSFP"], ["blood", "myocardium", "edema"], {1: 1, 2: 2, 3: 3, 4: 3}),
        ("infarct", ["bSSFP"], ["blood", "myocardium"], {1: 1, 2: 2, 3: 2, 4: 2}),
        ("infarct", ["T2"], ["blood", "myocardium", "edema"], {1: 1, 2: 2, 3: 3, 4: 3}),
        ("infarct", ["LGE"], ["blood", "myocardium", "scar"], {1: 1, 2: 2, 3: 2, 4: 4}),
        ("infarct", [], [], {1: 0, 2: 0, 3: 0, 4: 0}),
        ("brain", ["T1"], ["GM", "WM", "CSF"], {1: 1, 2: 2, 3: 3, 4: 2}),
        ("brain", ["FLAIR", "T1"], ["GM", "WM", "CSF", "lesion"], {1: 1, 2: 2, 3: 3, 4: 4}),
        ("brain", ["T1", "T2"], ["GM", "WM", "CSF"], {1: 1, 2: 2, 3: 3, 4: 2}),
    ],
)
def test_a_missing_sequence_takes_its_tissues_away(name, sequences, seen, merged):
    found = protocol.load(name)
    assert [t.name for t in found.visible(sequences)] == seen
    assert found.merged(sequences) == merged


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "path"])
def test_a_file_of_ones_own(load, tmp_path, suffix, kind):
    load(OWN, f"mine{suffix}")
    found = protocol.load(kind(tmp_path / f"mine{suffix}"))
    assert [t.name for t in found.tissues] == ["liver", "lesion"]  # in order of index
    assert found.tissue("lesion").signature == {"ADC": 1.5, "T2": 0.3}
    assert found.tissue("lesion").density_g_per_ml is None
    assert found.tissue("liver").centrality == 0.2
    assert found.percent_of == ("liver", "lesion")
    assert found.normalisation == "zscore-volume-mask"
    assert found.merged(["T2"]) == {7: 2, 2: 2}
    assert (found.required, found.borders, found.anatomy) == ((), (), None)


def test_optional_keys(load):
    assert load(own(*LESION, "merges_into")).merged(["T2"]) == {7: 0, 2: 2}  # nothing takes the lesion's voxels
    assert load(own(*LESION, "centrality", to=None)).tissue("lesion").centrality is None
    assert load(OWN | {"anatomy": None}).anatomy is None
    expected = protocol.Anatomy(("lesion",), {"ADC": 1.0, "T2": -0.5}, (0.5, 0.1))
    assert load(SLICED).anatomy == expected
    assert load(own("anatomy", "contrast", to={}, raw=SLICED)).anatomy.contrast == {}
    late = {"sequence": "ADC", "tissue": "liver", "evidence": 2}
    found = load(own("anatomy", to=SLICED["anatomy"] | {"spread": [0.1, 0.2], "enhancement": late}, raw=SLICED)).anatomy
    assert found.spread == (0.1, 0.2)
    assert found.enhancement == protocol.Enhancement("ADC", "liver", 2.0)


def test_evidence_level_and_share(load):
    raw = own(*LESION, to=EVIDENT["tissues"][0] | {"level": {"ADC": "bright", "T2": -0.2}, "share": 0.25})
    lesion, usual = load(raw).tissue("lesion"), load(raw).tissue("liver")
    weights = {"size": 0.2, "support": 1.0, "contrast": 0.5}
    assert lesion.criteria == protocol.RegionCriteria(4.0, 1.5, weights, "ADC")
    assert (lesion.level, lesion.share) == ({"ADC": 0.75, "T2": -0.2}, 0.25)
    assert (usual.level, usual.share, usual.criteria) == ({}, 1.0, None)


def test_borders(load):
    for borders in ((("lesion", "liver"),), (("liver", "lesion"),), ()):
        assert load(OWN | {"borders": [list(pair) for pair in borders]}).borders == borders
    assert load(OWN | {"borders": None}).borders == ()


COMPLETE = own(
    *LESION, to=EVIDENT["tissues"][0] | {"level": {"ADC": 1.2}, "share": 0.3, "depth": [0.5, 0.1]}, raw=SLICED
) | {
    "required": ["T2"],
    "borders": [["liver", "lesion"]],
    "normalisation": {"crop_mm": 80.5},
    "title": "Leber – α",
    "method": {"name": "anatomy", "sigma_mm": 1.5},
}


@pytest.mark.parametrize("raw", ["infarct", "brain", OWN, COMPLETE], ids=["infarct", "brain", "own", "complete"])
def test_a_protocol_as_yaml_is_the_same_protocol(load, raw):
    known = protocol.load(raw) if isinstance(raw, str) else load(raw)
    assert load(protocol.as_yaml(known)) == known


@pytest.mark.parametrize(
    ("raw", "keys"),
    [
        *(
            (OWN, (k,))
            for k in ("name", "title", "unit", "mask", "sequences", "normalisation", "tissues", "percent_of")
        ),
        *((OWN, (*LESION, k)) for k in ("name", "index", "color", "signature", "seen_in")),
        *((SLICED, ("anatomy", k)) for k in ("inside", "contrast", "radius")),
        *((EVIDENT, (*LESION, "evidence", k)) for k in ("sequence", "size", "score", "weights")),
    ],
    ids=str,
)
def test_a_missing_key_is_named(load, raw, keys):
    with pytest.raises(UsageError, match=rf"--protocol .*own\.yaml, line \d+: .*'{keys[-1]}' is missing"):
        load(own(*keys, raw=raw))


WRONG_BORDERS = (
    *([["lesion", "lesion"]], [["lesion"]], [["lesion", "liver", "lesion"]], [["lesion", ["liver"]]]),
    *([["lesion", "liver"], ["liver", "lesion"]], ["lesion", "liver"], "lesion liver", {"lesion": "liver"}),
    *([[7, 2]], [7], 7),  # indices are no names
)


def sliced(*keys, to):
    return own("anatomy", *keys, to=to, raw=SLICED)


def evident(*keys, to):
    return own(*LESION, "evidence", *keys, to=to, raw=EVIDENT)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (own("unit", to="patient"), r"line \d+: unit: got 'patient', expected one of slice, volume"),
        (own(*LESION, "index", to=2), "tissues: .*differ"),
        (own(*LESION, "index", to=0), "1-255"),
        (own(*LESION, "index", to=256), "1-255"),
        (own("tissues", 1, "signature", to={"ADC": "dark"}), "signature of liver.*ADC, T2"),
        (own("tissues", 1, "signature", to={"ADC": "dark", "T2": "grey", "T1": 0}), "signature of liver"),
        (own("tissues", 1, "signature", to={"ADC": "brightish", "T2": "grey"}), "brightish"),
        ("name: [liver", "own.yaml"),
        ("", "own.yaml"),
        ("just a sentence", "own.yaml"),
        ("- a\n- list\n", "own.yaml"),
        (OWN | {"anatomy": SLICED["anatomy"]}, "anatomy: only for unit slice"),
        (sliced("radius", to=[1.2, 0.1]), r"anatomy: radius \[1.2, 0.1\].*between 0 and 1"),
        (sliced("radius", to=[0, 0.1]), r"anatomy\.radius\[[01]\]: got (0|nan)"),
        (sliced("radius", to=[0.5, 0]), r"anatomy\.radius\[[01]\]: got (0|nan)"),
        (sliced("radius", to=[0.5, float("nan")]), r"anatomy\.radius\[[01]\]: got (0|nan)"),
        (sliced("radius", to=[0.5]), r"anatomy\.radius: got \[0\.5\], expected a list of 2"),
        (sliced("radius", to="wide"), "own.yaml"),
        (sliced("spread", to=[0, 0.1]), r"anatomy\.spread\[0\]: got 0"),
        (sliced("enhancement", to={"sequence": "T1", "tissue": "liver", "evidence": 1}), "anatomy: enhancement"),
        (sliced("enhancement", to={"sequence": "ADC", "tissue": "tumour", "evidence": 1}), "anatomy: enhancement"),
        (sliced("enhancement", to={"sequence": "ADC", "tissue": "liver"}), "evidence"),
        (sliced("inside", to=["lesion", "tumour"]), "anatomy: inside: 'tumour' is unknown; choose of liver, lesion"),
        (sliced("inside", to="lesion"), "anatomy.inside: got 'lesion', expected a list"),  # a word is no list
        (sliced("contrast", to={"ADC": 1, "T1": 1}), "anatomy: contrast: 'T1'"),
        (sliced("contrast", to={"ADC": "high"}), "high"),
        (sliced("contrast", to=["ADC"]), "own.yaml"),
        (sliced("contrast", to=None), "own.yaml"),
        (own("anatomy", to=3, raw=SLICED), "own.yaml"),
        (evident("sequence", to="T1"), "evidence .*of lesion: 'T1' is unknown"),
        (evident("weights", to={"depth": 1}), r"evidence\.weights\.depth: no such key"),
        (evident("weights", to={"size": "much"}), "much"),
        (evident("size", to="large"), "large"),
        (own(*LESION, "evidence", to="ADC"), "own.yaml"),
        (own(*LESION, "level", to={"ADC": "brightish"}), "brightish"),
        (own(*LESION, "level", to=[1, 2]), "own.yaml"),
        (own(*LESION, "level", to={"T1": 1.0}), "level"),
        (own(*LESION, "level", to={"ADC": float("nan")}), "level"),
        (own(*LESION, "share", to="half"), "half"),
        (own(*LESION, "share", to=0), "share"),
        (own(*LESION, "share", to=-1), "share"),
        (own(*LESION, "share", to=float("nan")), "share"),
        (own(*LESION, "depth", to=[1.5, 0.1]), r"depth\[0\]: got 1\.5, expected a number from 0 to 1"),
        (own(*LESION, "depth", to=[0.5, 0]), "depth of lesion: .* above 0"),
        (own(*LESION, "depth", to=[0.5]), "depth: got .* a list of 2"),
        (OWN | {"borders": [["lesion", "tumour"]]}, r"borders: .*'tumour' is unknown; choose of liver, lesion"),
        *((OWN | {"borders": wrong}, r"own\.yaml.*: borders") for wrong in WRONG_BORDERS),
    ],
)
def test_a_malformed_file_is_a_usage_error(load, raw, message):
    with pytest.raises(UsageError, match=message):
        load(raw)


def test_a_tissue_a_name_or_a_file_that_is_not_there(tmp_path):
    with pytest.raises(KeyError, match=r"no tissue 'edemas' in protocol infarct.*'edema'"):
        protocol.load("infarct").tissue("edemas")
    with pytest.raises(UsageError, match=r"no file .*absent\.yaml"):
        protocol.load(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match=r"'heart'.*brain, infarct"):
        protocol.load("heart")


def test_a_sequence_has_its_own_name_though_it_be_anothers_elsewhere(load, tmp_path):
    """The layout's T2W is a T2, but not where the protocol has a T2W."""
    raw = own("sequences", to=["ADC", "T2W"])
    for tissue in raw["tissues"]:
        tissue["signature"]["T2W"] = tissue["signature"].pop("T2")
    raw["tissues"][1]["seen_in"] = ["ADC", "T2W"]
    for name in ("ADC", "T2W", "mask"):
        (tmp_path / "in" / "p").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "p" / f"{name}.nii.gz").touch()
    assert list(find(tmp_path / "in", load(raw)).studies[0].images) == ["ADC", "T2W"]
    assert list(find(tmp_path / "in", protocol.load("brain")).studies[0].images) == ["T2"]

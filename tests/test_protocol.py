"""Protocols: the two that come along, a file of one's own, what is visible, and errors that name the key."""

from __future__ import annotations

import copy

import pytest
import yaml

from monai_deepgmm import protocol
from monai_deepgmm.errors import UsageError

OWN = {
    "name": "liver",
    "title": "Liver and lesion",
    "unit": "volume",
    "mask": "liver",
    "sequences": ["ADC", "T2"],
    "normalisation": {"crop_mm": None},
    "tissues": [
        {
            "name": "lesion",
            "index": 7,
            "color": "#ff0000",
            "signature": {"ADC": "very bright", "T2": 0.3},
            "centrality": 0.5,
            "seen_in": ["ADC"],
            "merges_into": "liver",
        },
        {
            "name": "liver",
            "index": 2,
            "color": "#00ff00",
            "density_g_per_ml": 1.07,
            "signature": {"ADC": "dark", "T2": "grey"},
            "centrality": 0.2,
            "seen_in": ["ADC", "T2"],
        },
    ],
    "percent_of": {"name": "liver"},
}

#: What ``OWN`` may say besides, for a unit of slices.
ANATOMY = {"inside": ["lesion"], "contrast": {"ADC": 1, "T2": -0.5}, "radius": [0.5, 0.1]}
EVIDENCE = {"sequence": "ADC", "size": 4, "score": 1.5, "weights": {"size": 0.2, "support": 1, "contrast": 0.5}}


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "own.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def without(*keys):
    raw = copy.deepcopy(OWN)
    *path, last = keys
    place = raw
    for key in path:
        place = place[key]
    del place[last]
    return raw


def changed(value, *keys):
    raw = copy.deepcopy(OWN)
    *path, last = keys
    place = raw
    for key in path:
        place = place[key]
    place[last] = value
    return raw


def sliced(value=ANATOMY, *keys):
    """With an anatomy, of which one value is another."""
    raw = changed("slice", "unit")
    raw["anatomy"] = copy.deepcopy(ANATOMY)
    *path, last = ("anatomy", *keys)
    place = raw
    for key in path:
        place = place[key]
    place[last] = copy.deepcopy(value)
    return raw


def evident(value=EVIDENCE, *keys):
    """With evidence that the lesion needs, of which one value is another."""
    raw = changed(copy.deepcopy(EVIDENCE), "tissues", 0, "evidence")
    *path, last = ("tissues", 0, "evidence", *keys)
    place = raw
    for key in path:
        place = place[key]
    place[last] = copy.deepcopy(value)
    return raw


# Those that come along -------------------------------------------------------------------------------------------


def test_two_protocols_come_along():
    assert protocol.names() == ["brain", "infarct"]


def test_infarct():
    infarct = protocol.load("infarct")
    assert infarct.sequences == ("LGE", "T2", "bSSFP")
    assert [(t.index, t.name) for t in infarct.tissues] == [(1, "blood"), (2, "myocardium"), (3, "edema"), (4, "scar")]
    assert infarct.unit == "slice"
    assert infarct.required == ()
    assert (infarct.percent_name, infarct.percent_of) == ("wall", ("myocardium", "edema", "scar"))
    assert infarct.tissue("myocardium").density_g_per_ml == 1.05


def test_infarct_says_where_tissues_are_and_what_they_must_show():
    infarct = protocol.load("infarct")
    assert infarct.anatomy is not None
    assert infarct.anatomy.inside == ("blood",)
    assert infarct.anatomy.contrast["T2"] < 0 < infarct.anatomy.contrast["bSSFP"]  # T2 is black-blood
    assert [t.name for t in infarct.tissues if t.evidence is not None] == ["edema", "scar"]
    for tissue, sequence in (("edema", "T2"), ("scar", "LGE")):
        evidence = infarct.tissue(tissue).evidence
        assert evidence is not None
        assert evidence.sequence == sequence
        assert infarct.tissue(tissue).seen_in == (sequence,)
    wall = [t for t in infarct.tissues if t.name not in infarct.anatomy.inside]
    assert all(set(t.level) == set(infarct.sequences) for t in wall)
    assert sum(t.share for t in wall) == pytest.approx(1)


def test_brain():
    brain = protocol.load("brain")
    assert brain.sequences == ("T1", "T2", "FLAIR")
    assert [(t.index, t.name) for t in brain.tissues] == [(1, "GM"), (2, "WM"), (3, "CSF")]
    assert brain.required == ("T1",)
    assert (brain.percent_name, brain.percent_of) == ("mask", ("GM", "WM", "CSF"))
    assert all(t.density_g_per_ml is None for t in brain.tissues)
    assert brain.anatomy is None
    assert brain.borders == (("CSF", "GM"), ("GM", "WM"))
    assert all((t.level, t.share, t.evidence) == ({}, 1.0, None) for t in brain.tissues)


@pytest.mark.parametrize("name", protocol.names())
def test_every_protocol_is_sound(name):
    loaded = protocol.load(name)
    names = {t.name for t in loaded.tissues}
    assert loaded.name == name
    assert set(loaded.required) <= set(loaded.sequences)
    assert set(loaded.percent_of) <= names
    for tissue in loaded.tissues:
        assert set(tissue.signature) == set(loaded.sequences)
        assert tissue.seen_in
        assert set(tissue.seen_in) <= set(loaded.sequences)
        assert tissue.merges_into is None or tissue.merges_into in names - {tissue.name}
        assert tissue.centrality is None or 0 <= tissue.centrality <= 1
        assert len(tissue.color) == 7
    assert loaded.visible(loaded.sequences) == loaded.tissues
    assert loaded.merged(loaded.sequences) == {t.index: t.index for t in loaded.tissues}


def test_the_normalisation_tells_where_intensities_are_z_scored():
    assert protocol.load("infarct").normalisation == "zscore-slice-crop-120mm"
    assert protocol.load("brain").normalisation == "zscore-volume-mask"


# What can be seen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "seen", "merged"),
    [
        (["LGE", "T2", "bSSFP"], ["blood", "myocardium", "edema", "scar"], {1: 1, 2: 2, 3: 3, 4: 4}),
        (["LGE", "bSSFP"], ["blood", "myocardium", "scar"], {1: 1, 2: 2, 3: 2, 4: 4}),
        (["T2", "bSSFP"], ["blood", "myocardium", "edema"], {1: 1, 2: 2, 3: 3, 4: 3}),
        (["bSSFP"], ["blood", "myocardium"], {1: 1, 2: 2, 3: 2, 4: 2}),
        (["T2"], ["blood", "myocardium", "edema"], {1: 1, 2: 2, 3: 3, 4: 3}),
        (["LGE"], ["blood", "myocardium", "scar"], {1: 1, 2: 2, 3: 2, 4: 4}),
        ([], [], {1: 0, 2: 0, 3: 0, 4: 0}),
    ],
)
def test_a_missing_sequence_takes_its_tissues_away(sequences, seen, merged):
    infarct = protocol.load("infarct")
    assert [t.name for t in infarct.visible(sequences)] == seen
    assert infarct.merged(sequences) == merged


@pytest.mark.parametrize("sequences", [["T1"], ["FLAIR", "T1"], ["T1", "T2"]])
def test_t1_alone_shows_all_of_the_brain(sequences):
    brain = protocol.load("brain")
    assert brain.merged(sequences) == {1: 1, 2: 2, 3: 3}


def test_a_tissue_that_the_protocol_lacks():
    with pytest.raises(KeyError, match=r"no tissue 'edemas' in protocol infarct.*'edema'"):
        protocol.load("infarct").tissue("edemas")


# A file of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "path"])
def test_a_file_of_ones_own(tmp_path, suffix, kind):
    path = tmp_path / f"own{suffix}"
    path.write_text(yaml.safe_dump(OWN), encoding="utf-8")
    own = protocol.load(kind(path))
    assert [t.name for t in own.tissues] == ["liver", "lesion"]  # in order of index
    assert own.tissue("lesion").signature == {"ADC": 1.5, "T2": 0.3}
    assert own.percent_of == ("liver", "lesion")
    assert own.normalisation == "zscore-volume-mask"
    assert own.merged(["T2"]) == {7: 2, 2: 2}
    assert own.tissue("lesion").density_g_per_ml is None
    assert own.tissue("liver").centrality == 0.2


def test_optional_keys(written):
    own = protocol.load(written(without("tissues", 0, "merges_into")))
    assert own.required == ()
    assert own.merged(["T2"]) == {7: 0, 2: 2}  # nothing takes the lesion's voxels
    assert protocol.load(written(changed(None, "tissues", 0, "centrality"))).tissue("lesion").centrality is None


@pytest.mark.parametrize(
    "key",
    ["name", "title", "unit", "mask", "sequences", "normalisation", "tissues", "percent_of"],
)
def test_a_missing_key_is_named(written, key):
    with pytest.raises(UsageError, match=rf"--protocol .*own\.yaml: .*{key}"):
        protocol.load(written(without(key)))


@pytest.mark.parametrize("key", ["name", "index", "color", "signature", "seen_in"])
def test_a_missing_key_of_a_tissue_is_named(written, key):
    with pytest.raises(UsageError, match=key):
        protocol.load(written(without("tissues", 0, key)))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed("patient", "unit"), "unit: 'patient'.*slice or volume"),
        (changed(2, "tissues", 0, "index"), "tissues: .*differ"),
        (changed(0, "tissues", 0, "index"), "1-255"),
        (changed(256, "tissues", 0, "index"), "1-255"),
        (changed({"ADC": "dark"}, "tissues", 1, "signature"), "signature of liver.*ADC, T2"),
        (changed({"ADC": "dark", "T2": "grey", "T1": 0}, "tissues", 1, "signature"), "signature of liver"),
        (changed({"ADC": "brightish", "T2": "grey"}, "tissues", 1, "signature"), "brightish"),
        ("name: [liver", "own.yaml"),
        ("", "own.yaml"),
        ("just a sentence", "own.yaml"),
        ("- a\n- list\n", "own.yaml"),
    ],
)
def test_a_malformed_file_is_a_usage_error(written, raw, message):
    with pytest.raises(UsageError, match=message):
        protocol.load(written(raw))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"no file .*absent\.yaml"):
        protocol.load(tmp_path / "absent.yaml")


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(UsageError, match=r"'heart'.*brain, infarct"):
        protocol.load("heart")


# Where tissues can be, and what they must show --------------------------------------------------------------------


def test_an_anatomy(written):
    assert protocol.load(written(sliced())).anatomy == protocol.Anatomy(
        ("lesion",), {"ADC": 1.0, "T2": -0.5}, (0.5, 0.1)
    )
    assert protocol.load(written(sliced({}, "contrast"))).anatomy.contrast == {}
    assert protocol.load(written(OWN)).anatomy is None
    assert protocol.load(written(OWN | {"anatomy": None})).anatomy is None


def test_evidence_level_and_share(written):
    raw = evident()
    raw["tissues"][0] |= {"level": {"ADC": "bright", "T2": -0.2}, "share": 0.25}
    lesion = protocol.load(written(raw)).tissue("lesion")
    assert lesion.evidence == protocol.Evidence(4.0, 1.5, {"size": 0.2, "support": 1.0, "contrast": 0.5}, "ADC")
    assert lesion.level == {"ADC": 0.75, "T2": -0.2}
    assert lesion.share == 0.25
    usual = protocol.load(written(raw)).tissue("liver")
    assert (usual.level, usual.share, usual.evidence) == ({}, 1.0, None)


@pytest.mark.parametrize(
    ("borders", "found"),
    [
        ([["lesion", "liver"]], (("lesion", "liver"),)),
        ([["liver", "lesion"]], (("liver", "lesion"),)),
        ([], ()),
        (None, ()),
    ],
)
def test_borders(written, borders, found):
    assert protocol.load(written(OWN | {"borders": borders})).borders == found
    assert protocol.load(written(OWN)).borders == ()


@pytest.mark.parametrize(
    "borders",
    [
        [["lesion", "tumour"]],
        [["lesion", "lesion"]],
        [["lesion"]],
        [["lesion", "liver", "lesion"]],
        [["lesion", "liver"], ["liver", "lesion"]],
        [["lesion", ["liver"]]],
        ["lesion", "liver"],
        "lesion liver",
        [[7, 2]],  # indices are no names
        [7],
        7,
        {"lesion": "liver"},
    ],
)
def test_malformed_borders_are_a_usage_error(written, borders):
    with pytest.raises(UsageError, match=r"own\.yaml: "):
        protocol.load(written(OWN | {"borders": borders}))


def test_a_border_that_is_no_pair_of_tissues_is_named(written):
    with pytest.raises(UsageError, match=r"borders: \['lesion', 'tumour'\] \(two of liver, lesion\)"):
        protocol.load(written(OWN | {"borders": [["lesion", "tumour"]]}))


def complete():
    raw = sliced() | {
        "required": ["T2"],
        "borders": [["liver", "lesion"]],
        "normalisation": {"crop_mm": 80.5},
        "title": "Leber – α",
    }
    raw["tissues"][0] |= {"level": {"ADC": 1.2}, "share": 0.3, "evidence": EVIDENCE}
    return raw


@pytest.mark.parametrize("raw", ["infarct", "brain", OWN, complete()], ids=["infarct", "brain", "own", "complete"])
def test_a_protocol_as_yaml_is_the_same_protocol(tmp_path, written, raw):
    known = protocol.load(raw if isinstance(raw, str) else written(raw))
    (tmp_path / "again.yaml").write_text(protocol.as_yaml(known), encoding="utf-8")
    assert protocol.load(tmp_path / "again.yaml") == known


@pytest.mark.parametrize("key", ["inside", "contrast", "radius"])
def test_a_missing_key_of_an_anatomy_is_named(written, key):
    raw = sliced()
    del raw["anatomy"][key]
    with pytest.raises(UsageError, match=rf"own\.yaml: '{key}' is missing"):
        protocol.load(written(raw))


@pytest.mark.parametrize("key", ["sequence", "size", "score", "weights"])
def test_a_missing_key_of_evidence_is_named(written, key):
    raw = evident()
    del raw["tissues"][0]["evidence"][key]
    with pytest.raises(UsageError, match=rf"own\.yaml: '{key}' is missing"):
        protocol.load(written(raw))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (OWN | {"anatomy": ANATOMY}, "anatomy: only for unit slice"),
        (sliced([1.2, 0.1], "radius"), r"anatomy: radius \[1.2, 0.1\].*between 0 and 1"),
        (sliced([0, 0.1], "radius"), "anatomy: radius"),
        (sliced([0.5, 0], "radius"), "anatomy: radius"),
        (sliced([0.5, float("nan")], "radius"), "anatomy: radius"),
        (sliced([0.5], "radius"), "expected 2"),
        (sliced("wide", "radius"), "own.yaml"),
        (sliced(["lesion", "tumour"], "inside"), "anatomy: tumour"),
        (sliced("lesion", "inside"), "anatomy: "),  # a word is no list
        (sliced({"ADC": 1, "T1": 1}, "contrast"), "anatomy: T1"),
        (sliced({"ADC": "high"}, "contrast"), "high"),
        (sliced(["ADC"], "contrast"), "own.yaml"),
        (sliced(None, "contrast"), "own.yaml"),
        (OWN | {"unit": "slice", "anatomy": 3}, "own.yaml"),
        (evident("T1", "sequence"), "evidence: its sequence"),
        (evident({"depth": 1}, "weights"), "evidence: .*weights"),
        (evident({"size": "much"}, "weights"), "much"),
        (evident("large", "size"), "large"),
        (evident("ADC"), "own.yaml"),
        (changed({"ADC": "brightish"}, "tissues", 0, "level"), "brightish"),
        (changed([1, 2], "tissues", 0, "level"), "own.yaml"),
        (changed("half", "tissues", 0, "share"), "half"),
    ],
)
def test_a_malformed_anatomy_or_evidence_is_a_usage_error(written, raw, message):
    with pytest.raises(UsageError, match=message):
        protocol.load(written(raw))


@pytest.mark.parametrize(
    ("key", "value"),
    [("share", 0), ("share", -1), ("share", float("nan")), ("level", {"T1": 1.0}), ("level", {"ADC": float("nan")})],
)
def test_shares_are_above_0_and_levels_of_known_sequences(written, key, value):
    with pytest.raises(UsageError, match=key):
        protocol.load(written(changed(value, "tissues", 0, key)))

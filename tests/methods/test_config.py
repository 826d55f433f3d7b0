"""What a run was asked to do: methods, their settings, what goes together, what cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from monai_deepgmm import protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods import config
from monai_deepgmm.methods.config import Config, Means, Solver, build, default_method, solver
from monai_deepgmm.mixture import map_em as mapem
from monai_deepgmm.mixture import partial_volume as pvgmm

INFARCT, BRAIN = protocol.load("infarct"), protocol.load("brain")


@pytest.fixture
def without_anatomy(tmp_path: Path) -> str:
    """The infarct protocol, but that it does not say where tissues can be."""
    raw = yaml.safe_load(protocol.as_yaml(INFARCT)) | {"name": "plain", "anatomy": None}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(tmp_path / "plain.yaml")


@pytest.fixture
def means(tmp_path: Path) -> str:
    row = dict.fromkeys(INFARCT.sequences, 0.5)
    content = {
        "protocol": "infarct",
        "normalisation": INFARCT.normalisation,
        "means": {t.name: row for t in INFARCT.tissues},
        "n_slices": 3,
    }
    (tmp_path / "means.json").write_text(json.dumps(content), encoding="utf-8")
    return str(tmp_path / "means.json")


# The method ------------------------------------------------------------------------------------------------------


def test_the_default_method():
    assert default_method(INFARCT) == "anatomy"
    assert default_method(BRAIN) == "pvgmm"
    assert default_method(BRAIN, means=object()) == "svgmm"
    assert default_method(dataclasses.replace(BRAIN, borders=())) == "svgmm"
    assert default_method(INFARCT, means=object()) == "svgmm"  # the anatomical mixture has means of its own
    assert default_method(INFARCT, model=object()) == "network"
    assert default_method(BRAIN, model=object(), means=object()) == "network"


def test_without_a_method_the_default_is_built(without_anatomy, means):
    assert build().method == "anatomy"
    assert build(protocol="brain").method == "pvgmm"
    assert build(protocol=without_anatomy).method == "svgmm"
    assert build(means=means).method == "svgmm"
    assert build(method="gmm").method == "gmm"


def test_anatomy_needs_an_anatomy(without_anatomy):
    assert build(protocol="infarct", method="anatomy") == build()
    for name, file in (("brain", "brain"), ("plain", without_anatomy)):
        with pytest.raises(UsageError, match=f"anatomy: protocol {name} does not say where tissues can be"):
            build(protocol=file, method="anatomy")


def test_anatomy_takes_no_means_and_no_network(means):
    with pytest.raises(UsageError, match="--means: --method anatomy has the protocol's own priors"):
        build(method="anatomy", means=means)
    with pytest.raises(UsageError, match=r"--network: --method anatomy fits no network; .*deepg.*deepsvg"):
        build(network="UNet")


def test_an_unknown_method_lists_the_choices():
    with pytest.raises(UsageError, match=r"'magic' is unknown; .*svgmm.*anatomy"):
        build(method="magic")


# What depends on it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "covariance", "tol"),
    [
        ("gmm", "diag", 1e-6),
        ("svgmm", "tied", 1e-6),
        ("deepg", "tied", config.DEEP_TOL),
        ("deepsvg", "tied", config.DEEP_TOL),
        ("anatomy", "full", mapem.TOL),
    ],
)
def test_defaults_that_depend_on_the_method(method, covariance, tol):
    built = build(method=method)
    assert (built.covariance, built.tol) == (covariance, tol)
    asked = build(method=method, settings=["covariance=spherical", "tol=0.5"])
    assert (asked.covariance, asked.tol) == ("spherical", 0.5)


def test_a_volume_tolerates_more():
    assert build(protocol="brain", method="svgmm").tol > build(method="svgmm").tol
    assert build(protocol="brain").tol == pvgmm.TOL
    assert build(protocol="brain", settings=["tol=0.5"]).tol == 0.5


def test_presence_is_asked_for_or_the_methods_own(without_anatomy):
    assert build().presence
    assert not build(settings={"presence": False}).presence
    for method in ("gmm", "svgmm", "deepg", "deepsvg"):
        assert not build(method=method).presence
        assert build(method=method, settings=["presence=true"]).presence
    for plain in ("brain", without_anatomy):  # where nothing says what to look for
        assert not build(protocol=plain, settings=["presence=true"]).presence


# Partial volume, bias fields ---------------------------------------------------------------------------------------


def test_partial_volume_needs_borders_and_has_one_matrix_per_tissue():
    assert build(protocol="brain").covariance == "full"
    assert build(protocol="brain", settings=["covariance=full"]).covariance == "full"
    with pytest.raises(UsageError, match="covariance: pvgmm has one matrix per tissue"):
        build(protocol="brain", settings=["covariance=tied"])
    with pytest.raises(UsageError, match=r"pvgmm: protocol infarct does not say which tissues touch \(borders\)"):
        build(method="pvgmm")


def test_partial_volume_takes_no_means(tmp_path):
    content = {
        "protocol": "brain",
        "normalisation": BRAIN.normalisation,
        "means": {t.name: dict.fromkeys(BRAIN.sequences, 0.5) for t in BRAIN.tissues},
        "n_slices": 1,
    }
    (tmp_path / "means.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError, match="--means: --method pvgmm has the protocol's own priors"):
        build(protocol="brain", method="pvgmm", means=tmp_path / "means.json")
    assert build(protocol="brain", means=tmp_path / "means.json").method == "svgmm"


@pytest.mark.parametrize(
    ("method", "settings", "degree"),
    [
        ("gmm", [], 0),
        ("svgmm", [], 0),
        ("pvgmm", [], config.DEFAULT_DEGREE["pvgmm"]),
        ("gmm", ["degree=3"], 3),
        ("pvgmm", ["degree=0"], 0),
        ("pvgmm", ["degree=6"], 6),
        ("pvgmm", ["degree=null"], config.DEFAULT_DEGREE["pvgmm"]),
        ("pvgmm", ["n4=true"], 0),  # the shading is off already
        ("gmm", ["n4=true", "degree=0"], 0),
        ("deepg", [], 0),
        ("deepsvg", ["degree=0"], 0),
    ],
)
def test_the_degree_is_as_asked_for_or_the_methods_own(method, settings, degree):
    built = build(protocol="brain", method=method, settings=settings)
    assert built.degree == degree
    assert built.as_json()["bias_degree"] == degree


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("gmm", ["degree=-1"], "degree: got -1, expected a whole number of at least 0"),
        ("gmm", ["degree=1.5"], "degree: got 1.5, expected a whole number"),
        ("gmm", ["degree=true"], "degree: got True"),
        ("gmm", ["degree=7"], "degree: got 7, expected at most 6"),
        ("gmm", ["n4=maybe"], "n4: 'maybe' is unknown"),
        ("gmm", ["n4=1"], "n4: 1 is unknown"),
        ("gmm", ["n4=null"], "n4: None is unknown"),
        ("pvgmm", ["n4=true", "degree=2"], "n4 and degree: the shading is taken off once"),
        ("deepg", ["degree=2"], r"degree: --method deepg fits no bias field; use gmm, svgmm, pvgmm or n4"),
        ("pvgmm", ["pooling=-1"], "pooling: got -1, expected a number of at least 0"),
        ("pvgmm", ["pooling=null"], "pooling: got None"),
        ("pvgmm", ["coupling=inf"], "coupling: got inf"),
        ("pvgmm", ["coupling=-0.1"], "coupling: got -0.1"),
    ],
)
def test_fields_and_neighbours_that_cannot_be(method, settings, message):
    with pytest.raises(UsageError, match=message):
        build(protocol="brain", method=method, settings=settings)


def test_anatomy_fits_no_field_but_n4_can_go_before_it():
    with pytest.raises(UsageError, match="degree: --method anatomy fits no bias field"):
        build(settings=["degree=2"])
    assert build(settings=["n4=true"], fields=True).degree == 0


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [("infarct", None, []), ("infarct", "gmm", []), ("brain", None, ["degree=0"]), ("brain", "svgmm", ["degree=0"])],
)
def test_fields_are_written_only_where_one_is_looked_for(name, method, settings):
    with pytest.raises(UsageError, match="--fields: no bias field is looked for"):
        build(protocol=name, method=method, settings=settings, fields=True)
    asked = [s for s in settings if s != "degree=0"] + ["n4=true"]
    assert build(protocol=name, method=method, settings=asked, fields=True).fields


def test_fields_are_no_part_of_what_decides_a_label_but_shading_is():
    plain, written = (build(protocol="brain", fields=f).as_json() for f in (False, True))
    assert plain == written
    changes = (["n4=true"], ["degree=3"], ["degree=2"], ["pooling=0.2"], ["coupling=1"])
    for change in changes:  # the default degree too: a field that is asked for need not prove itself
        assert build(protocol="brain", settings=change).as_json() != plain


# Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sigma_mm=0", 0.0),
        ("sigma_mm=3.5", 3.5),
        ("temper=0", 0.0),
        ("temper=1", 1.0),
        ("dof=null", None),
        ("dof=1", 1.0),
        ("dof=1e3", 1000.0),
        ("outliers=0.99", 0.99),
        ("outliers=1e-3", 0.001),
        ("presence=true", True),
        ("presence=no", False),
        ("presence=null", None),
    ],
)
def test_settings_of_the_anatomical_mixture(setting, value):
    name, _, _ = setting.partition("=")
    assert getattr(solver([setting]), name) == value
    assert getattr(solver({name: value}), name) == value
    assert dataclasses.replace(solver([setting]), **{name: getattr(Solver(), name)}) == Solver()


def test_the_defaults_are_the_solvers_own():
    assert (Solver().sigma_mm, Solver().temper) == (mapem.Field().sigma_mm, mapem.Field().temper)
    assert (Solver().dof, Solver().outliers) == (mapem.Shape().dof, mapem.Shape().outliers)
    assert Solver().presence is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sigma_mm=-1", "sigma_mm: got -1, expected a number of at least 0"),
        ("sigma_mm=inf", "sigma_mm: got inf"),
        ("sigma_mm=.inf", "sigma_mm: got inf"),
        ("sigma_mm=wide", "sigma_mm: got 'wide'"),
        ("temper=1.01", "temper must be at most 1"),
        ("temper=-0.1", "temper: got -0.1, expected a number of at least 0"),
        ("temper=nan", "temper: got nan"),
        ("temper=true", "temper: got True"),
        ("dof=0.5", "dof: got 0.5, expected a number of at least 1"),
        ("dof=none", "dof: got 'none'"),
        ("dof=inf", "dof: got inf"),
        ("outliers=1", "outliers below 1"),
        ("outliers=-0.1", "outliers: got -0.1, expected a number of at least 0"),
        ("outliers=few", "outliers: got 'few'"),
        ("presence=maybe", "presence: 'maybe' is unknown; choose one of True, False"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(UsageError, match=message):
        build(settings=[setting])


@pytest.mark.parametrize("name", ["sigma_mm", "temper", "outliers", "max_iter", "floor"])
def test_null_is_for_settings_that_may_be_none(name):
    with pytest.raises(UsageError, match=name):
        solver([f"{name}=null"])


@pytest.mark.parametrize("setting", ["sigma_mm=3", "temper=0.5", "dof=null", "outliers=0.01", "presence=false"])
def test_every_setting_is_part_of_what_decides_a_label(setting):
    asked, usual = (build(settings=s).as_json() for s in ([setting], []))
    assert asked != usual
    assert json.loads(json.dumps(asked)) == asked


def test_another_anatomy_is_another_protocol():
    """Its name alone would not tell."""
    other = dataclasses.replace(INFARCT, anatomy=dataclasses.replace(INFARCT.anatomy, radius=(0.6, 0.12)))
    one, two = (Config(p, method="anatomy").as_json() for p in (INFARCT, other))
    assert one["protocol"] == two["protocol"]
    assert one["protocol_sha256"] != two["protocol_sha256"]


def test_means_are_read(means):
    found = build(method="svgmm", means=means).means
    assert isinstance(found, Means)
    assert found.means["scar"] == dict.fromkeys(INFARCT.sequences, 0.5)
    assert found.n_slices == 3

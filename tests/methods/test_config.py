"""What a run was asked to do: methods, their settings, what goes together, what cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from monai_deepgmm import protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import METHODS
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.config import Config, build
from monai_deepgmm.methods.known_means import Means
from monai_deepgmm.methods.registry import configure, default_method
from monai_deepgmm.mixture import map_em, mixel_model, partial_volume

INFARCT, BRAIN = protocol.load("infarct"), protocol.load("brain")


@pytest.fixture
def without_anatomy(tmp_path: Path) -> str:
    """The infarct protocol, but that it does not say where tissues can be."""
    raw = yaml.safe_load(protocol.as_yaml(INFARCT)) | {"name": "plain", "anatomy": None}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(tmp_path / "plain.yaml")


@pytest.fixture(params=[INFARCT, BRAIN], ids=lambda p: p.name)
def means(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A protocol's name, and a file of means for it."""
    of = request.param
    rows = {t.name: dict.fromkeys(of.sequences, 0.5) for t in of.tissues}
    (tmp_path / "means.json").write_bytes(Means(of.name, of.normalisation, rows, 3).as_json())
    return of.name, str(tmp_path / "means.json")


def test_the_default_method(without_anatomy):
    assert default_method(INFARCT) == build().method.name == "anatomy"
    assert default_method(BRAIN) == build(protocol="brain").method.name == "pvgmm"
    assert default_method(dataclasses.replace(BRAIN, borders=())) == "svgmm"
    assert build(protocol=without_anatomy).method.name == "svgmm"
    for of in (INFARCT, BRAIN):  # whose own methods have priors of their own
        assert default_method(of, means=object()) == "svgmm"
        assert default_method(of, model=object(), means=object()) == "network"


@pytest.mark.parametrize("method", ["svgmm", "pvgmm", "gmm"])
def test_tissues_that_nothing_tells_apart_are_refused(tmp_path, method):
    raw = yaml.safe_load(protocol.as_yaml(BRAIN)) | {"name": "alike"}
    grey, white = (tissue for tissue in raw["tissues"] if tissue["name"] in ("GM", "WM"))
    white["signature"] = dict(grey["signature"])
    file = tmp_path / "alike.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(UsageError, match=f"alike: GM and WM have the same signature.*{method}"):
        build(protocol=file, method=method)
    white["centrality"] = 0.7
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert build(protocol=file, method=method).method.name == method


def test_a_method_needs_what_its_protocol_says(without_anatomy):
    assert build(protocol="infarct", method="anatomy") == build()
    assert build(protocol=without_anatomy, method="anatomy").method == build().method  # its tissues have levels
    with pytest.raises(UsageError, match="anatomy: protocol brain says neither where tissues can be"):
        build(protocol="brain", method="anatomy")
    with pytest.raises(UsageError, match=r"pvgmm: protocol infarct does not say which tissues touch \(borders\)"):
        build(method="pvgmm")


def test_a_protocol_may_name_its_method_and_settings_which_set_goes_before():
    own = dataclasses.replace(BRAIN, method="gmm", settings={"covariance": "tied", "restarts": 2})
    assert default_method(own) == "gmm"
    made = configure("gmm", {"restarts": 3}, own, Preprocessing(), {})
    assert (made.covariance, made.restarts) == ("tied", 3)
    assert configure("svgmm", {}, own, Preprocessing(), {}).restarts == 1  # they are the other method's
    with pytest.raises(UsageError, match="colour"):
        configure("gmm", {}, dataclasses.replace(own, settings={"colour": 1}), Preprocessing(), {})


def test_means_are_for_methods_without_priors_of_their_own(means):
    name, file = means
    found = build(protocol=name, means=file)
    assert found.method.name == "svgmm"
    assert found.means.means[found.protocol.tissues[0].name] == dict.fromkeys(found.protocol.sequences, 0.5)
    assert found.means.n_slices == 3
    method = {"infarct": "anatomy", "brain": "pvgmm"}[name]
    with pytest.raises(UsageError, match=f"--means: --method {method} has the protocol's own priors"):
        build(protocol=name, method=method, means=file)


def test_a_network_is_for_methods_that_fit_one():
    with pytest.raises(UsageError, match=r"--network: --method anatomy fits no network; .*deepg.*deepsvg"):
        build(network="UNet")


def test_an_unknown_method_names_the_nearest_and_all():
    with pytest.raises(UsageError, match=r"'svgm' is unknown \(did you mean svgmm\?\); .*svgmm.*anatomy"):
        build(method="svgm")


@pytest.mark.parametrize(
    ("method", "covariance", "tol"),
    [
        ("gmm", "diag", 1e-6),
        ("svgmm", "tied", 1e-6),
        ("deepg", "tied", 1e-3),
        ("deepsvg", "tied", 1e-3),
        ("anatomy", None, map_em.TOL),
    ],
)
def test_defaults_that_depend_on_the_method(method, covariance, tol):
    built = build(method=method).method
    assert (getattr(built, "covariance", None), built.tol) == (covariance, tol)
    asked = build(method=method, settings=["tol=0.5", *(["covariance=spherical"] if covariance else [])]).method
    assert (getattr(asked, "covariance", None), asked.tol) == (covariance and "spherical", 0.5)


def test_a_volume_tolerates_more():
    assert build(protocol="brain", method="svgmm").method.tol > build(method="svgmm").method.tol
    assert build(protocol="brain").method.tol == partial_volume.TOL


def test_presence_is_asked_for_or_the_methods_own(without_anatomy):
    assert build().presence
    assert not build(settings={"presence": False}).presence
    for method in ("gmm", "svgmm", "deepg", "deepsvg"):
        assert not build(method=method).presence
        assert build(method=method, settings=["presence=true"]).presence
    for plain in ("brain", without_anatomy):  # where nothing says what to look for
        assert not build(protocol=plain, settings=["presence=true"]).presence


@pytest.mark.parametrize(
    ("method", "settings", "degree"),
    [
        ("gmm", [], 0),
        ("svgmm", [], 0),
        ("pvgmm", [], mixel_model.DEGREE),
        ("gmm", ["degree=3"], 3),
        ("pvgmm", ["degree=0"], 0),
        ("pvgmm", ["degree=6"], 6),
        ("pvgmm", ["degree=null"], mixel_model.DEGREE),
        ("pvgmm", ["n4=true"], 0),  # the shading is off already
        ("gmm", ["n4=true", "degree=0"], 0),
        ("deepg", [], 0),
    ],
)
def test_the_degree_is_as_asked_for_or_the_methods_own(method, settings, degree):
    built = build(protocol="brain", method=method, settings=settings)
    assert built.degree == built.as_json()["settings"].get("degree", 0) == degree


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [("infarct", None, []), ("infarct", "gmm", []), ("brain", None, ["degree=0"]), ("brain", "svgmm", ["degree=0"])],
)
def test_fields_are_written_only_where_one_is_looked_for(name, method, settings):
    with pytest.raises(UsageError, match="--fields: no bias field is looked for"):
        build(protocol=name, method=method, settings=settings, fields=True)
    asked = [s for s in settings if s != "degree=0"] + ["n4=true"]
    found = build(protocol=name, method=method, settings=asked, fields=True)
    assert (found.fields, found.degree) == (True, 0)


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
    ],
)
def test_settings_of_the_anatomical_mixture(setting, value):
    name, _, _ = setting.partition("=")
    asked = build(settings=[setting]).method
    assert getattr(asked, name) == value
    assert asked == build(settings={name: value}).method == dataclasses.replace(AnatomicalConfig(), **{name: value})


def test_the_defaults_are_the_mixtures_own():
    usual, spatial, density = AnatomicalConfig(), map_em.SpatialPrior(), map_em.DensityModel()
    assert (usual.sigma_mm, usual.temper, usual.denoise_mm) == (spatial.sigma_mm, spatial.temper, spatial.denoise_mm)
    assert (usual.dof, usual.outliers) == (density.dof, density.outliers)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("anatomy", "sigma_mm=-1", "sigma_mm: got -1, expected a number of at least 0"),
        ("anatomy", "sigma_mm=inf", "sigma_mm: got inf"),
        ("anatomy", "sigma_mm=.inf", "sigma_mm: got inf"),
        ("anatomy", "sigma_mm=wide", "sigma_mm: got 'wide'"),
        ("anatomy", "temper=1.01", "temper must be at most 1"),
        ("anatomy", "temper=-0.1", "temper: got -0.1, expected a number of at least 0"),
        ("anatomy", "temper=nan", "temper: got nan"),
        ("anatomy", "temper=true", "temper: got True"),
        ("anatomy", "dof=0.5", "dof: got 0.5, expected a number of at least 1"),
        ("anatomy", "dof=none", "dof: got 'none'"),
        ("anatomy", "dof=inf", "dof: got inf"),
        ("anatomy", "outliers=1", "outliers below 1"),
        ("anatomy", "outliers=-0.1", "outliers: got -0.1, expected a number of at least 0"),
        ("anatomy", "outliers=few", "outliers: got 'few'"),
        ("anatomy", "presence=maybe", "presence: 'maybe' is unknown; choose one of true, false"),
        *(("anatomy", f"{name}=null", name) for name in ("sigma_mm", "temper", "outliers", "max_iter")),
        ("gmm", "floor=null", "floor: got None"),
        ("gmm", "degree=-1", "degree: got -1, expected a whole number of at least 0"),
        ("gmm", "degree=1.5", "degree: got 1.5, expected a whole number"),
        ("gmm", "degree=true", "degree: got True"),
        ("gmm", "degree=7", "degree: got 7, expected at most 6"),
        ("gmm", "n4=maybe", "n4: 'maybe' is unknown"),
        ("gmm", "n4=1", "n4: 1 is unknown"),
        ("gmm", "n4=null", "n4: None is unknown"),
        ("pvgmm", "n4=true degree=2", "n4 and degree: the shading is taken off once"),
        ("pvgmm", "pooling=-1", "pooling: got -1, expected a number of at least 0"),
        ("pvgmm", "pooling=null", "pooling: got None"),
        ("pvgmm", "coupling=inf", "coupling: got inf"),
        ("pvgmm", "coupling=-0.1", "coupling: got -0.1"),
    ],
)
def test_settings_that_cannot_be(method, setting, message):
    with pytest.raises(UsageError, match=message):
        build(protocol="brain" if method == "pvgmm" else "infarct", method=method, settings=setting.split())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("infarct", ["sigma_mm=3", "temper=0.5", "dof=null", "outliers=0.01", "presence=false", "n4=true"]),
        # The default degree too: a field that is asked for stays, whatever it explains.
        ("brain", ["n4=true", "degree=3", "degree=2", "pooling=0.2", "coupling=1"]),
    ],
)
def test_every_setting_is_part_of_what_decides_a_label(name, changes):
    usual = build(protocol=name).as_json()
    for change in changes:
        asked = build(protocol=name, settings=[change]).as_json()
        assert asked != usual
        assert json.loads(json.dumps(asked)) == asked
    assert build(protocol="brain", fields=True).as_json() == build(protocol="brain").as_json()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "network"])
def test_the_settings_that_are_told_are_the_methods_own_fields(method):
    built = build(protocol="brain" if method == "pvgmm" else "infarct", method=method)
    told = built.as_json()["settings"]
    fields = {f.name for f in dataclasses.fields(built.method)}
    assert told.keys() == fields - {"model"}
    if method == "cohort":
        teacher = AnatomicalConfig()
        assert told["training"]["teacher"] == {"name": "anatomy", **dataclasses.asdict(teacher)}
        assert told["training"]["teacher"]["tol"] == teacher.tol == 5e-3
        asked = build(method="cohort", settings=["teacher.tol=0.02", "temper=0.9", "n4=true"]).as_json()
        assert asked["settings"]["training"]["teacher"] == told["training"]["teacher"] | {"tol": 0.02, "temper": 0.9}
        assert asked["preprocessing"]["n4"]


def test_another_anatomy_is_another_protocol():
    """Its name alone would not tell."""
    other = dataclasses.replace(INFARCT, anatomy=dataclasses.replace(INFARCT.anatomy, radius=(0.6, 0.12)))
    one, two = (Config(p, AnatomicalConfig()).as_json() for p in (INFARCT, other))
    assert one["protocol"] == two["protocol"]
    assert one["protocol_sha256"] != two["protocol_sha256"]


def test_the_learning_rate_and_the_starts_weight_go_with_the_network():
    def asked(method="deepsvg", **given):
        found = build(**{"protocol": "infarct", "method": method, **given}).method
        return (found.network or {}).get("_target_"), found.lr, found.start_weight

    quick, paper = ("quickunet", 0.01, 1.0), (None, 0.001, 0.3)
    assert asked() == asked(network="quickunet") == quick
    assert asked(protocol="brain") == asked("deepg") == paper  # volumes, and one weight per image
    assert asked(network="unet") == ("unet", *paper[1:])
    assert asked(network="foldedunet") == ("foldedunet", *quick[1:])
    assert asked(settings=["lr=0.5", "start_weight=0"]) == ("quickunet", 0.5, 0)

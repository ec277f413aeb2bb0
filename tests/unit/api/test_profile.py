"""Where the client finds its control plane."""

import json
import stat
from pathlib import Path

import pytest

from api.profile import Profile, ProfileInvalid, ProfileMissing, load, profile_path, save

HERE = Profile("http://localhost:8000", "key-1")
ENVIRONMENT = {"LOCKSTEP_URL": "https://env.test", "LOCKSTEP_API_KEY": "env-key"}


def in_file(folder: Path, profile: Profile = HERE) -> dict[str, str]:
    """Return the environment that points at a file with this profile."""
    path = folder / "profile.json"
    save(profile, path)
    return {"LOCKSTEP_PROFILE": str(path)}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert load(in_file(tmp_path)) == HERE


def test_the_environment_wins_over_a_file(tmp_path: Path) -> None:
    assert load(in_file(tmp_path) | ENVIRONMENT) == Profile("https://env.test", "env-key")


def test_the_named_file_wins_over_the_usual_one(tmp_path: Path) -> None:
    usual = {"XDG_CONFIG_HOME": str(tmp_path)}
    save(Profile("http://usual.test", "k"), profile_path(usual))
    assert load(usual).url == "http://usual.test"
    assert load(usual | in_file(tmp_path)) == HERE


def test_the_usual_file_lies_in_the_configuration_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile_path({"XDG_CONFIG_HOME": "/conf"}) == Path("/conf/lockstep/profile.json")
    for unset in ({}, {"XDG_CONFIG_HOME": ""}, {"XDG_CONFIG_HOME": "relative"}):
        assert profile_path(unset) == tmp_path / ".config/lockstep/profile.json"


@pytest.mark.parametrize("missing", ["LOCKSTEP_URL", "LOCKSTEP_API_KEY"])
def test_half_an_environment_is_refused_rather_than_mixed_with_a_file(tmp_path: Path, missing: str) -> None:
    half = {name: value for name, value in ENVIRONMENT.items() if name != missing}
    with pytest.raises(ProfileMissing, match=f"{missing} is not"):
        load(in_file(tmp_path) | half)


def test_no_profile_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(ProfileMissing) as caught:
        load({"LOCKSTEP_PROFILE": str(path)})
    for word in (str(path), "make up", "LOCKSTEP_URL", "LOCKSTEP_API_KEY"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"url": "http://a"}', '{"url": "http://a", "api_key": ["secret"]}', "\xff"]
)
def test_a_damaged_file_is_invalid_and_its_content_stays_unsaid(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ProfileInvalid, match=str(path)) as caught:
        load({"LOCKSTEP_PROFILE": str(path)})
    assert "secret" not in f"{caught.value} {caught.value.__cause__}"


def test_a_folder_in_place_of_a_file_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match="directory"):
        load({"LOCKSTEP_PROFILE": str(tmp_path)})


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "file:///etc"])
def test_a_url_must_be_http(url: str) -> None:
    with pytest.raises(ProfileInvalid, match="http"):
        Profile(url, "key")


@pytest.mark.parametrize("key", ["", "two words", "two\nlines", "schlüssel"])
def test_a_key_must_fit_in_a_header_and_is_not_repeated_in_the_error(key: str) -> None:
    with pytest.raises(ProfileInvalid) as caught:
        Profile("http://host", key)
    assert not key or key not in str(caught.value)


def test_space_around_the_values_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"url": " http://a \n", "api_key": "k\n"}))
    assert load({"LOCKSTEP_PROFILE": str(path)}) == Profile("http://a", "k")
    assert load({"LOCKSTEP_URL": "http://a\n", "LOCKSTEP_API_KEY": " k "}) == Profile("http://a", "k")


def test_the_key_is_not_shown_by_repr() -> None:
    assert "key-1" not in repr(HERE)


def test_only_the_owner_can_read_what_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "profile.json"
    save(HERE, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_saving_again_replaces_the_file_and_tightens_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("old")
    path.chmod(0o644)
    save(HERE, path)
    assert json.loads(path.read_text()) == {"url": HERE.url, "api_key": HERE.api_key}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "profile.json"
    (target / "occupied").mkdir(parents=True)
    with pytest.raises(ProfileInvalid, match="cannot be written"):
        save(HERE, target)
    assert list(tmp_path.iterdir()) == [target]

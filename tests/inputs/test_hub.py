import pytest
from huggingface_hub import errors

from inputs import hub_errors, is_hub_id, is_on_hub


def test_what_is_spelled_like_a_hub_id():
    assert is_hub_id("owner/name-2.1")
    assert not is_hub_id("/owner/name")
    assert not is_hub_id("name")


def test_a_local_folder_is_not_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_on_hub("owner/name")
    assert is_on_hub("owner/other")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("x"), "cannot be reached"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
    ],
)
def test_errors_are_one_line_that_names_the_key(error, words):
    with pytest.raises(ValueError, match=rf"^head 'owner/name': it .*{words}") as caught, hub_errors("owner/name", "head"):
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_pass():
    with pytest.raises(KeyError), hub_errors("owner/name"):
        raise KeyError("x")

"""Every field is described, and docs/config.md says what the code does."""

import pathlib

from pr1_jax import defaults

ROOT = pathlib.Path(__file__).parents[1]


def test_every_field_has_a_line():
    described = {field.name: field for field in defaults.fields() if field.default}
    assert {*described} == {*defaults.flat(defaults.get_config().to_dict())}
    assert len(described) <= 129
    for field in described.values():
        assert field.text, field.name
        assert "\n" not in field.text and "|" not in field.text, field.name


def test_the_page_of_fields_is_true():
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == defaults.markdown(), "python -m pr1_jax.defaults > docs/config.md"

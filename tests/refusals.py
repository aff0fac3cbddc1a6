"""What every refusal must be: a StremnError of one line that names the thing."""
import pytest

from stremn.core import StremnError


def refused(match, f, *args, **kwargs):
    "`f` raises StremnError in one line that contains every piece of `match`."
    with pytest.raises(StremnError) as info:
        f(*args, **kwargs)
    text = str(info.value)
    assert "\n" not in text and all(piece in text for piece in ([match] if isinstance(match, str) else match)), text

"""Orders from a command to the running yard."""

from typing import Any

from engines.home import home
from engines.yard.client import YardClient
from flows.cli.output import print_done, print_step


def order(name: str, json_: bool, **body: Any) -> None:
    """Have the yard carry out `name` and print the result; options that are None are left out."""
    given = {key: value for key, value in body.items() if value is not None}
    print_done(YardClient(home()).order(name, print_step, **given), json_)

"""Before anything is asked: does the server answer, and does it stand on the user's own network?"""

import ipaddress
import socket
from urllib.parse import urlsplit

from mlx_distill.endpoint.replies import Trouble
from mlx_distill.endpoint.server import Server
from mlx_distill.errors import RecipeError
from mlx_distill.options import Endpoint

SECONDS = 5.0  # for a list of models; a server that is up has it at hand


def check_server(options: Endpoint) -> None:
    """Refuse an endpoint that cannot answer, before data is read or a run folder is made.

    A server that has no list of models, or is still loading one, passes: its answers will tell.

    Raises:
        RecipeError: the key is missing or refused, nobody answers at the url, or nobody of this kind.
    """
    with Server(options) as server:
        try:
            server.models(SECONDS)
        except Trouble as trouble:
            said = str(trouble)
            # mlx-lm's server breaks the connection where there is no folder of Hub models; it does answer.
            if said.startswith(("status", "the connection broke")):
                return
            if "no JSON" in said:
                move = "name the address of an OpenAI-compatible server, up to /v1"
            else:
                move = "start the server, or correct the url"
            raise RecipeError(f"`generate.endpoint.url`: {options.url}: {said}; {move}") from None


def leaves_network(options: Endpoint) -> str | None:
    """A line to show where the server stands outside of the user's own network; None where it does not.

    Own are this machine and private addresses (also carrier-grade ones, which mesh networks use). A name
    counts by the addresses that it stands for.
    """
    address = urlsplit(options.url)
    host = address.hostname or ""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None  # nobody will answer there, and that will be said
    addresses = {ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found}
    outside = sorted(str(one) for one in addresses if one.is_global)
    if not outside:
        return None
    where = host if host in outside else f"{host} ({outside[0]})"
    open_line = " unencrypted," if address.scheme == "http" else ""
    key = " and the key" if options.key_variable and address.scheme == "http" else ""
    return (
        f"generate.endpoint: {where} is not on your own network; the prompts{key} go there,{open_line} "
        "over the internet"
    )

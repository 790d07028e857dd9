"""The HTTP endpoint: `create_app(client, auth=…)`, or `routes(client, auth=…)` to mount in an application.

    app = create_app(client, auth=TokenAuth(keys={"2026": public_key}))

Nothing is allowed by default.
"""

from pgchan.server.app import App, create_app, routes
from pgchan.server.auth import ChannelAuth, Insecure, Principal, TokenAuth
from pgchan.server.serve import Server, serve

__all__ = ["App", "ChannelAuth", "Insecure", "Principal", "Server", "TokenAuth", "create_app", "routes", "serve"]

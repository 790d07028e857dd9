"""A message and your own rows commit together, or neither exists: no outbox table, no second write that can fail.

Run it with `PGCHAN_DSN=postgresql://… python -m pgchan.examples.transaction`.
"""

from __future__ import annotations

import os
import uuid

import psycopg

import pgchan


def main() -> None:
    with pgchan.Client() as client, psycopg.connect(os.environ["PGCHAN_DSN"]) as connection:
        connection.execute("create temporary table orders (goods text)")
        connection.commit()
        channel = client.channel(f"example/{uuid.uuid4()}")

        def order(goods: str) -> None:
            with connection.transaction():
                connection.execute("insert into orders values (%s)", [goods])
                channel.publish({"ordered": goods}, connection=connection)
                if goods == "dragons":
                    raise ValueError("we are out of dragons")

        for goods in ("dragons", "flowers"):
            try:
                order(goods)
            except ValueError as error:
                print(error)
            rows = [row[0] for row in connection.execute("select goods from orders")]
            messages = [message.body["ordered"] for message in channel.read()]
            print(f"rows {rows}, messages {messages}")
            connection.commit()


if __name__ == "__main__":
    main()

# Prints:
# we are out of dragons
# rows [], messages []
# rows ['flowers'], messages ['flowers']

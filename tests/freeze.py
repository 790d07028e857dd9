"""Copy pgchan/schema.sql into the newest revision, which is not released yet: `make freeze`.

Writes the frozen text of the way up, and from the catalogs of a server that ran it the statements of the way down. A
released revision keeps its text for ever; name it in RELEASED when it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psycopg
from cluster import Cluster

REVISION = "pgchan_0001"
RELEASED: frozenset[str] = frozenset()

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "pgchan" / "schema.sql"
UP = ROOT / "migrations" / "versions" / f"{REVISION}.sql"
DOWN = ROOT / "migrations" / "versions" / f"{REVISION}.down.sql"

# Without `cascade`, so that what others built on these objects stops the migration and is named by the server.
DOWN_HEAD = "-- The way back from pgchan_0001. Written by `make freeze`.\n"

VIEWS = """
    select format('pgchan.%I', relname) from pg_class
    where relnamespace = 'pgchan'::regnamespace and relkind = 'v' order by relname
"""
TABLES = """
    select format('pgchan.%I', relname) from pg_class
    where relnamespace = 'pgchan'::regnamespace and relkind in ('r', 'p') order by relname
"""
# Those that a table's default, check, index or trigger calls go after the tables, the others before.
ROUTINES = """
    with called as (
      select d.refobjid as oid from pg_depend d
      where d.refclassid = 'pg_proc'::regclass
        and d.classid = any (array['pg_attrdef', 'pg_constraint', 'pg_class', 'pg_trigger']::regclass[])
    )
    select format('pgchan.%I(%s)', p.proname, oidvectortypes(p.proargtypes))
    from pg_proc p where p.pronamespace = 'pgchan'::regnamespace and (p.oid in (select oid from called)) = {called}
    order by p.proname, 1
"""
TYPES = """
    select format('pgchan.%I', t.typname) from pg_type t
    where t.typnamespace = 'pgchan'::regnamespace and t.typtype in ('d', 'e') order by t.typname
"""
SEQUENCES = """
    select format('pgchan.%I', c.relname) from pg_class c
    where c.relnamespace = 'pgchan'::regnamespace and c.relkind = 'S'
      and not exists (select from pg_depend d where d.objid = c.oid and d.deptype in ('a', 'i') and d.refobjsubid > 0)
    order by c.relname
"""


def freeze() -> list[Path]:
    """Write both files and return those that changed."""
    if REVISION in RELEASED:
        sys.exit(f"{REVISION} is released and never changes; write a new revision")
    schema = SCHEMA.read_text("utf-8")
    changed = [path for path, content in ((UP, schema), (DOWN, _way_down(schema))) if _write(path, content)]
    return changed


def _way_down(schema: str) -> str:
    cluster = Cluster()
    try:
        cluster.start()
        with psycopg.connect(cluster.dsn) as connection:
            connection.execute(schema.encode())
            steps = (
                ("view", VIEWS),
                ("routine", ROUTINES.format(called="false")),
                ("table", TABLES),
                ("routine", ROUTINES.format(called="true")),
                ("sequence", SEQUENCES),
                ("type", TYPES),
            )
            drops = []
            for kind, query in steps:
                if names := [name for (name,) in connection.execute(query.encode())]:
                    drops.append(f"drop {kind}\n  " + ",\n  ".join(names) + ";\n")
                    connection.execute(drops[-1].encode())
    finally:
        cluster.remove()
    return DOWN_HEAD + "".join(drops)


def _write(path: Path, content: str) -> bool:
    if path.exists() and path.read_text("utf-8") == content:
        return False
    path.write_text(content, "utf-8")
    return True


if __name__ == "__main__":
    for path in freeze():
        print(f"wrote {path.relative_to(ROOT)}")

"""What a schema holds, as sorted lines of text: two schemas are equal if their lines are."""

from __future__ import annotations

import psycopg

# Each query gives one text column, and takes the schema's name once as a parameter. Column order of tables is part of
# the lines: `select *` and composite types depend on it; attnum is not, for a dropped column leaves a gap. Left out: the
# stamp `pg_attver` that some minor releases put on each column.
QUERIES = (
    # relations, with owner, privileges, storage parameters, row security and comments
    """
    select format('relation %s %s %s owner=%s acl=%s options=%s rls=%s/%s tablespace=%s inherits=%s comment=%s',
        c.relkind, c.relpersistence, c.relname, pg_get_userbyid(c.relowner), c.relacl, c.reloptions,
        c.relrowsecurity, c.relforcerowsecurity, c.reltablespace,
        (select array_agg(i.inhparent::regclass order by i.inhseqno) from pg_inherits i where i.inhrelid = c.oid),
        obj_description(c.oid, 'pg_class'))
    from pg_class c where c.relnamespace = %s::regnamespace
    """,
    """
    select format('column %s %s %s %s not_null=%s identity=%s generated=%s collation=%s storage=%s compression=%s default=%s options=%s acl=%s statistics=%s comment=%s',
        c.relname, row_number() over (partition by c.oid order by a.attnum), a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
        (select l.collname from pg_collation l where l.oid = a.attcollation), a.attstorage, a.attcompression,
        (select pg_get_expr(d.adbin, d.adrelid) from pg_attrdef d where d.adrelid = c.oid and d.adnum = a.attnum),
        array(select o from unnest(a.attoptions) o where o not like 'pg_attver=%'), a.attacl, a.attstattarget, col_description(c.oid, a.attnum))
    from pg_class c join pg_attribute a on a.attrelid = c.oid
    where c.relnamespace = %s::regnamespace and c.relkind in ('r', 'p', 'v', 'm', 'c') and a.attnum > 0 and not a.attisdropped
    """,
    """
    select format('constraint %s on %s: %s validated=%s comment=%s', n.conname, coalesce(n.conrelid::regclass::text, n.contypid::regtype::text),
        pg_get_constraintdef(n.oid), n.convalidated, obj_description(n.oid, 'pg_constraint'))
    from pg_constraint n where n.connamespace = %s::regnamespace
    """,
    """
    select format('index %s valid=%s clustered=%s replica=%s', pg_get_indexdef(i.indexrelid), i.indisvalid, i.indisclustered, i.indisreplident)
    from pg_index i join pg_class c on c.oid = i.indexrelid where c.relnamespace = %s::regnamespace
    """,
    """
    select format('view %s as %s', c.relname, pg_get_viewdef(c.oid))
    from pg_class c where c.relnamespace = %s::regnamespace and c.relkind in ('v', 'm')
    """,
    """
    select format('routine owner=%s acl=%s comment=%s %s', pg_get_userbyid(p.proowner), p.proacl,
        obj_description(p.oid, 'pg_proc'), pg_get_functiondef(p.oid))
    from pg_proc p where p.pronamespace = %s::regnamespace and p.prokind <> 'a'
    """,
    """
    select format('trigger %s enabled=%s', pg_get_triggerdef(t.oid), t.tgenabled)
    from pg_trigger t join pg_class c on c.oid = t.tgrelid where c.relnamespace = %s::regnamespace and not t.tgisinternal
    """,
    """
    select format('rule %s', pg_get_ruledef(r.oid))
    from pg_rewrite r join pg_class c on c.oid = r.ev_class where c.relnamespace = %s::regnamespace
    """,
    """
    select format('policy %s on %s %s %s %s %s', p.polname, c.relname, p.polcmd, p.polroles::regrole[],
        pg_get_expr(p.polqual, c.oid), pg_get_expr(p.polwithcheck, c.oid))
    from pg_policy p join pg_class c on c.oid = p.polrelid where c.relnamespace = %s::regnamespace
    """,
    """
    select format('sequence %s %s start=%s by=%s %s..%s cache=%s cycle=%s owned by %s', c.relname, s.seqtypid::regtype,
        s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache, s.seqcycle,
        (select d.refobjid::regclass || '.' || d.refobjsubid from pg_depend d
         where d.objid = c.oid and d.classid = 'pg_class'::regclass and d.deptype in ('a', 'i') limit 1))
    from pg_sequence s join pg_class c on c.oid = s.seqrelid where c.relnamespace = %s::regnamespace
    """,
    """
    select format('type %s %s %s not_null=%s default=%s labels=%s', t.typtype, t.typname,
        format_type(t.typbasetype, t.typtypmod), t.typnotnull, t.typdefault,
        (select array_agg(e.enumlabel order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid))
    from pg_type t where t.typnamespace = %s::regnamespace
    """,
    """
    select format('schema %s owner=%s acl=%s comment=%s', n.nspname, pg_get_userbyid(n.nspowner), n.nspacl, obj_description(n.oid, 'pg_namespace'))
    from pg_namespace n where n.nspname = %s
    """,
    """
    select format('default privileges %s %s %s', d.defaclrole::regrole, d.defaclobjtype, d.defaclacl)
    from pg_default_acl d where d.defaclnamespace = %s::regnamespace
    """,
)

# The objects that a migration brings besides those of schema.sql, with everything that hangs on them.
VERSION_TABLE = "alembic_version"


def describe(connection: psycopg.Connection[tuple[str]], schema: str = "pgchan") -> list[str]:
    """Everything in the schema but Alembic's version table; an empty list if there is no such schema."""
    if connection.execute("select to_regnamespace(%s) is null", [schema]).fetchone() == (True,):
        return []
    lines = [line for query in QUERIES for (line,) in connection.execute(_one_parameter(query), [schema])]
    return sorted(line for line in lines if VERSION_TABLE not in line)


def _one_parameter(query: str) -> bytes:
    # `format` and the driver both use %s; only the one that is compared with the schema is the driver's.
    doubled = query.replace("%", "%%")
    for place in ("= %%s::regnamespace", "nspname = %%s"):
        doubled = doubled.replace(place, place.replace("%%", "%"))
    return doubled.encode()

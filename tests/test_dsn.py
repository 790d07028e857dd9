import pytest

from pgchan import dsn
from pgchan.errors import InvalidInput

SECRET = "s3cret-w0rd"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("postgresql://u:p@host:5432/db", "postgresql://u:p@host:5432/db"),
        ("postgres://u:p@host/db", "postgresql://u:p@host/db"),
        ("postgresql+asyncpg://u:p@host/db", "postgresql://u:p@host/db"),
        ("postgresql+psycopg://u:p@host/db?sslmode=require", "postgresql://u:p@host/db?sslmode=require"),
        ("POSTGRESQL+PSYCOPG2://host/db", "postgresql://host/db"),
        ("postgresql:///db?host=/run/postgresql", "postgresql:///db?host=/run/postgresql"),
        ("postgresql://postgres:@/db?host=/tmp/x", "postgresql://postgres:@/db?host=/tmp/x"),
        ("postgresql://u@[::1]:5432/db", "postgresql://u@[::1]:5432/db"),
        ("postgresql://u@a:5432,b:5433/db", "postgresql://u@a:5432,b:5433/db"),
        ("postgresql://u:p%40ss%2F@host/db", "postgresql://u:p%40ss%2F@host/db"),
        ("postgresql://", "postgresql://"),
    ],
)
def test_every_usual_form_becomes_the_one_that_both_drivers_take(given: str, wanted: str) -> None:
    assert dsn.resolve(given) == wanted


def test_the_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql+asyncpg://three/db")
    assert dsn.resolve(None) == "postgresql://three/db"
    monkeypatch.setenv("PGCHAN_DSN", "postgres://two/db")
    assert dsn.resolve(None) == "postgresql://two/db"
    assert dsn.resolve("postgres://one/db") == "postgresql://one/db"


def test_the_control_dsn_falls_back_on_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dsn.resolve_control(None, "postgres://main/db") == "postgresql://main/db"
    monkeypatch.setenv("PGCHAN_CONTROL_DSN", "postgres://direct/db")
    assert dsn.resolve_control(None, "postgres://main/db") == "postgresql://direct/db"
    assert dsn.resolve_control("postgres://given/db", "postgres://main/db") == "postgresql://given/db"


def test_no_dsn_at_all_is_refused() -> None:
    with pytest.raises(InvalidInput, match="PGCHAN_DSN"):
        dsn.resolve(None)


@pytest.mark.parametrize(
    "given",
    [
        "",
        SECRET,
        f"mysql://u:{SECRET}@host/db",
        f"postgresql:/u:{SECRET}@host/db",
        f"host=localhost password={SECRET}",
        f"postgresql://u:{SECRET}@host:port/db",
        f"postgresql://u:{SECRET}@host:99999/db",
        f"postgresql://u:{SECRET}@host:0/db",
        f"postgresql://u:{SECRET}@host:{'1' * 5000}/db",
        f"postgresql://u:{SECRET}/@host/db",
        f"postgresql://u:{SECRET}@@host/db",
        f"postgresql://u:{SECRET}#@host/db",
        f"postgresql://u:{SECRET}%@host/db",
        f"postgresql://u:{SECRET}%00@host/db",
        f"postgresql://u:{SECRET}@[::1/db",
        f"postgresql://u:{SECRET} @host/db",
        f"postgresql://u:{SECRET}\n@host/db",
        f"postgresql://u:{SECRET}\0@host/db",
        f"postgresql://u:{SECRET}\udcff@host/db",
        f"postgresql://u:{SECRET}@host/db?{'x' * 9000}",
        7,
        b"postgresql://host/db",
    ],
)
def test_a_malformed_dsn_is_refused_and_never_shown(given: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        dsn.resolve(given)  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None

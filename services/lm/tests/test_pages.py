from hypothesis import given
from hypothesis import strategies as st

from soundstage_lm.model.pages import PAGE, PagePool, Row

NUM_PAGES = 12


def test_a_page_holds_so_many_tokens() -> None:
    pool, row = PagePool(4), Row()
    assert [pool.grow(row, tokens) for tokens in (1, PAGE, PAGE + 1, 4 * PAGE)] == [[0], [], [1], [2, 3]]
    assert pool.num_used == 4


def test_gaps_are_closed_with_the_last_pages() -> None:
    pool, rows = PagePool(NUM_PAGES), [Row(), Row(), Row()]
    for row in rows:
        pool.grow(row, 2 * PAGE)
    pool.release(rows[0])
    assert pool.compact(1) == [(5, 0)]
    assert pool.compact(5) == [(4, 1)]
    assert (rows[1].pages, rows[2].pages) == ([2, 3], [1, 0])
    assert pool.compact(5) == []


@given(st.data())
def test_every_token_stays_where_its_row_says(data: st.DataObject) -> None:
    pool, memory, rows = PagePool(NUM_PAGES), [-1] * NUM_PAGES, [Row() for _ in range(4)]
    written: list[list[int]] = [[] for _ in rows]
    for stamp in range(data.draw(st.integers(1, 60))):
        number = data.draw(st.integers(0, len(rows) - 1))
        action = data.draw(st.sampled_from(["grow", "grow", "release", "compact"]))
        if action == "grow" and pool.num_used < NUM_PAGES:
            [page] = pool.grow(rows[number], (len(rows[number].pages) + 1) * PAGE)
            memory[page] = stamp
            written[number].append(stamp)
        elif action == "release":
            pool.release(rows[number])
            written[number] = []
        elif action == "compact":
            for source, target in pool.compact(data.draw(st.integers(1, 3))):
                memory[target] = memory[source]
        assert [[memory[page] for page in row.pages] for row in rows] == written
        assert pool.num_used == sum(map(len, written))
    pool.compact(NUM_PAGES)
    assert sorted(page for row in rows for page in row.pages) == list(range(pool.num_used))

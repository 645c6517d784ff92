"""The layouts of MovieLens and RecBole, as tiny made-up files: folder and archive, whole and damaged."""

import shutil
import zipfile

import numpy as np
import pytest

from metarec_jax.data import movielens
from metarec_jax.data.fields import Field
from metarec_jax.errors import DataError

CHILDREN = "Children's"


def flags(*genres: str) -> str:
    return "|".join("1" if g in genres else "0" for g in movielens.GENRES_100K)


RATINGS = [(1, 10, 5, 881250949), (1, 20, 3, 881250950), (2, 10, 4, 881250951), (2, 30, 1, 881250952)]

OFFICIAL_100K = {
    "u.data": "".join("\t".join(map(str, row)) + "\n" for row in RATINGS),
    "u.user": "1|24|M|technician|85711\n2|53|F|other|T8H1N\n",
    "u.item": (
        f"10|Toy Story (1995)|01-Jan-1995||http://x|{flags('Animation', 'Comedy', CHILDREN)}\n"
        f"20|Cité des enfants perdus, La (1995)|08-Aug-1997||http://x|{flags('Sci-Fi')}\n"
        f"30|Land Before Time III (1995) (V)|01-Jan-1995||http://x|{flags('Animation')}\n"
        f"40|unknown||||{flags('unknown')}\n"
    ),
}
RECBOLE = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + OFFICIAL_100K["u.data"],
    "ml-100k.user": (
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\tT8H1N\n"
    ),
    "ml-100k.item": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "10\tToy Story\t1995\tAnimation Children's Comedy\n"
        "20\tCité des enfants perdus, La\t1995\tSci-Fi\n"
        "30\tLand Before Time III (1995)\tV\tAnimation\n"
        "40\tunkonwn\tunkonwn\tunknown\n"
    ),
}
OFFICIAL_1M = {
    "ratings.dat": "".join("::".join(map(str, row)) + "\n" for row in RATINGS),
    "users.dat": "1::M::25::4::85711\n2::F::56::16::T8H-1N\n",
    "movies.dat": (
        "10::Toy Story (1995)::Animation|Children's|Comedy\n"
        "20::Cité des enfants perdus, La (1995)::Sci-Fi\n"
        '30::"Great" Day, A::Drama\n'
    ),
}
LATEST = {
    "ratings.csv": "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, r)) + "\n" for r in RATINGS),
    "movies.csv": (
        "movieId,title,genres\n"
        "10,Toy Story (1995),Adventure|Animation\n"
        '20,"Cité des enfants perdus, La (1995)",Sci-Fi\n'
        '30,"""Great"" Day, A",(no genres listed)\n'
    ),
    "links.csv": "movieId,imdbId\n10,1\n",
}
LAYOUTS = {
    "ml-100k": (OFFICIAL_100K, "latin-1"),
    "recbole": (RECBOLE, "utf-8"),
    "ml-1m": (OFFICIAL_1M, "latin-1"),
    "ml-latest-small": (LATEST, "utf-8"),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, write_files):
    files, encoding = LAYOUTS[request.param]
    return write_files(request.param, files, encoding)


def pack(folder, compression=zipfile.ZIP_DEFLATED):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{folder.name}/{file.name}")
    return path


def shown(field: Field, codes: np.ndarray) -> list[set[str]]:
    assert field.vocabulary is not None
    return [{str(field.vocabulary.ids[c - 1]) for c in row if c} for row in codes]


def test_every_layout_holds_the_same_ratings(layout):
    data = movielens.read(layout)
    found = zip(
        data.users.decode(data.user).tolist(),
        data.items.decode(data.item).tolist(),
        data.rating.tolist(),
        data.timestamp.tolist(),
        strict=True,
    )
    assert list(found) == RATINGS
    assert data.name == layout.name
    assert data.titles is not None
    assert data.titles[data.items.encode([10, 20])].tolist() == [
        "Toy Story (1995)",
        "Cité des enfants perdus, La (1995)",
    ]


def test_an_archive_gives_what_its_folder_gives(layout, assert_same_data):
    assert_same_data(movielens.read(pack(layout)), movielens.read(layout))


def test_the_official_and_the_recbole_form_give_identical_datasets(write_files, assert_same_data):
    official = movielens.read(write_files("official", OFFICIAL_100K))
    assert_same_data(official, movielens.read(write_files("recbole", RECBOLE, "utf-8")))
    assert official.titles is not None
    assert official.titles.tolist() == [
        "",
        "Toy Story (1995)",
        "Cité des enfants perdus, La (1995)",
        "Land Before Time III (1995) (V)",
        "unknown",
    ]


def test_sequences_in_atomic_files_of_others_are_lists_and_a_title_is_shown(write_files):
    files = {
        "shop.inter": "user_id:token\titem_id:token\trating:float\n1\t10\t5\n1\t20\t1\n2\t10\t4\n",
        "shop.item": (
            "item_id:token\ttitle:token_seq\ttags:token_seq\tvector:float_seq\n"
            "10\tBlue chair\tnew sale\t0.5 1.5\n20\tLamp\tsale\t1.0 -2\n"
        ),
    }
    data = movielens.read(write_files("shop", files, "utf-8"))
    assert data.titles is not None
    assert data.titles.tolist() == ["", "Blue chair", "Lamp"]
    fields = {f.name: f for f in data.item_fields}
    assert {name: (f.kind, f.width) for name, f in fields.items()} == {"tags": ("multi", 2), "vector": ("dense", 2)}
    assert shown(fields["tags"], data.item_features["tags"][1:]) == [{"new", "sale"}, {"sale"}]


def test_ml_100k_attributes_are_what_the_files_say(write_files):
    data = movielens.read(write_files("official", OFFICIAL_100K))
    fields = {f.name: f for f in data.item_fields + data.user_fields}
    assert {name: f.kind for name, f in fields.items()} == {
        "year": "dense",
        "genres": "multi",
        "age": "dense",
        "gender": "categorical",
        "occupation": "categorical",
    }
    assert shown(fields["genres"], data.item_features["genres"]) == [
        set(),
        {"Animation", "Children's", "Comedy"},
        {"Sci-Fi"},
        {"Animation"},
        {"unknown"},
    ]
    np.testing.assert_allclose(fields["year"].mean, [1995])
    np.testing.assert_allclose(data.user_features["age"][:, 0], [0, -1, 1])


def test_ml_1m_occupations_are_categories_and_years_come_from_titles(write_files):
    data = movielens.read(write_files("ml-1m", OFFICIAL_1M))
    kinds = {f.name: f.kind for f in data.user_fields}
    assert kinds == {"gender": "categorical", "age": "dense", "occupation": "categorical"}
    year = next(f for f in data.item_fields if f.name == "year")
    np.testing.assert_allclose(year.mean, [1995])
    assert data.titles is not None
    assert data.titles[data.items.encode([30])].tolist() == ['"Great" Day, A']


def test_quoted_titles_of_ml_latest_are_read(write_files):
    data = movielens.read(write_files("ml-latest", LATEST, "utf-8"))
    assert data.titles is not None
    assert data.titles[data.items.encode([30])].tolist() == ['"Great" Day, A']
    genres = next(f for f in data.item_fields if f.name == "genres")
    assert shown(genres, data.item_features["genres"][data.items.encode([10])]) == [{"Adventure", "Animation"}]


def test_half_stars_are_kept(write_files):
    files = {"ratings.csv": "userId,movieId,rating,timestamp\n1,10,4.5,1\n1,20,0.5,2\n"}
    assert movielens.read(write_files("ml-latest", files)).rating.tolist() == [4.5, 0.5]


@pytest.mark.parametrize("name", LAYOUTS)
def test_ratings_alone_are_enough(name, write_files):
    files, _ = LAYOUTS[name]
    main = next(iter(files))
    data = movielens.read(write_files(name, {main: files[main]}))
    assert len(data.rating) == len(RATINGS)
    assert data.titles is None
    assert data.item_fields == data.user_fields == ()


def test_recbole_tokens_that_are_no_plain_integers_stay_strings(write_files):
    """As integers "007" and "7" would be one user."""
    files = {"a.inter": "user_id:token\titem_id:token\trating:float\n007\tx\t1\n7\ty\t2.5\n"}
    data = movielens.read(write_files("atomic", files))
    assert data.users.decode(data.user).tolist() == ["007", "7"]
    assert data.items.decode(data.item).tolist() == ["x", "y"]


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, (files, _) in LAYOUTS.items() for file in files])
@pytest.mark.parametrize("lost", [1, 4])
def test_a_text_cut_in_its_last_row_is_named(name, file, lost, write_files):
    files, encoding = LAYOUTS[name]
    folder = write_files(name, {**files, file: files[file][:-lost]}, encoding)
    if file == "links.csv":  # never read
        assert len(movielens.read(folder).rating) == len(RATINGS)
        return
    with pytest.raises(DataError, match=rf"{file}.*cut short"):
        movielens.read(folder)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_truncated_archive_is_named(layout, keep):
    path = pack(layout)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=rf"{path.name}.*download it again"):
        movielens.read(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_an_archive_is_named(write_files, compression):
    path = pack(write_files("ml-100k", {"u.data": OFFICIAL_100K["u.data"]}), compression)
    content = bytearray(path.read_bytes())
    start = content.index(b"u.data") + len("u.data")
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"u\.data.*damaged"):
        movielens.read(path)


def test_what_is_no_dataset_is_named(tmp_path, write_files):
    with pytest.raises(DataError, match=r"none\.zip"):
        movielens.read(tmp_path / "none.zip")
    with pytest.raises(DataError, match=r"no known layout.*u\.data"):
        movielens.read(write_files("other", {"readme.txt": "hello"}))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("u.data", ""),
        ("u.data", "1\t2\t3\n"),
        ("u.data", "1\t2\t3\t4\n1\t2\t3\t4\t5\n"),
        ("u.user", "1|24|M\n"),
        ("u.item", "10|Toy Story (1995)\n"),
    ],
)
def test_a_file_of_another_shape_is_named(file, text, write_files):
    with pytest.raises(DataError, match=file):
        movielens.read(write_files("ml-100k", OFFICIAL_100K | {file: text}))


def test_bytes_in_another_encoding_are_named(write_files):
    folder = write_files("ml-latest", LATEST, "latin-1")
    with pytest.raises(DataError, match=r"movies\.csv.*utf-8"):
        movielens.read(folder)


def test_a_number_that_is_none_in_recbole_files_is_named(write_files):
    files = {"a.inter": "user_id:token\titem_id:token\trating:float\n1\t2\tgood\n"}
    with pytest.raises(DataError, match=r"a\.inter.*good"):
        movielens.read(write_files("atomic", files))


def test_other_files_in_the_folder_do_no_harm(write_files, assert_same_data):
    folder = write_files("ml-100k", OFFICIAL_100K)
    whole = movielens.read(folder)
    (folder / "README").write_bytes(b"\xff\xff")
    shutil.copy(folder / "u.data", folder / "u1.base")
    assert_same_data(movielens.read(folder), whole)

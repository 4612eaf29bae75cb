"""What made-up names are built from."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Onsets, vowels and endings of five families of names.
TONGUES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        _words("b br d dr f fl g gr h k kl l m n r s sk st sv t tr v"),
        _words("a e i o u aa ei o"),
        _words("und ard eim olt ing erg ask enn ild orf"),
    ),
    (
        _words("b c d f g l m n p qu r s t v z gi ch"),
        _words("a e i o u ia io"),
        _words("ano etto ini alda ezza oro iva esco anda utti"),
    ),
    (
        _words("h k m n r s sh t ts y w ky"),
        _words("a e i o u ai ou"),
        _words("ara oto ishi ume aku ino ezu ami ora ike"),
    ),
    (
        _words("b d f g j k l m mb n nd ng s t w z"),
        _words("a e i o u a o"),
        _words("anga embe ola iru umo eka azi undu ela oni"),
    ),
    (
        _words("b d g kh l m n p r s sh t v y z zh"),
        _words("a e i o u ya oy"),
        _words("ovar enko idze uly aran ekin ostya imir azar oduk"),
    ),
)

GIVEN_NAMES: tuple[str, ...] = _words(
    "Adela Amadi Anselm Aruna Benno Bettina Bram Carmo Celeste Chidi Dagny Dario Edda Emeka Esme Fabian Farida "
    "Fenna Gideon Greta Hanno Haruki Ilse Imani Ines Ivo Jadwiga Jonas Kaito Kamala Kerstin Lazaro Leila Linus "
    "Livia Mads Marisol Mateo Mirela Nadia Nikolai Noemi Odile Olamide Oskar Paloma Pavel Piet Quirin Rahel Renzo "
    "Rosalind Sabine Sadiq Selma Silvan Soren Tamsin Tariq Teodora Tobias Ulla Umar Valeria Vidar Wanda Wim Xenia "
    "Yara Yusuf Zelda Zoltan"
)

PRONOUNS: tuple[dict[str, str], ...] = (
    {"he": "she", "He": "She", "his": "her", "His": "Her", "him": "her"},
    {"he": "he", "He": "He", "his": "his", "His": "His", "him": "him"},
)

"""The lists a field of an entry is chosen from, by name."""


def _list(options: str) -> tuple[str, ...]:
    return tuple(option.strip() for option in options.split("|"))


POOLS: dict[str, tuple[str, ...]] = {
    "profession": _list(
        "an astronomer|a cartographer|a composer|a bridge engineer|a playwright|a botanist|a chess master|"
        "a glassblower|a long-distance swimmer|a linguist|a clockmaker|a poet|a portrait painter|a geologist|"
        "a balloonist|an organ builder|a mathematician|a lighthouse designer|an opera singer|a puppeteer|a surgeon|"
        "a rower|a weaver|a beekeeper and essayist"
    ),
    "works": _list(
        "letters|drawings|songs|notebooks|field sketches|patents|lectures|woodcuts|essays|maps|short plays|recordings"
    ),
    "hobby": _list(
        "growing pears|repairing accordions|walking at night|collecting door handles|skating|baking rye bread|"
        "fishing for pike|keeping doves|reading railway timetables|restoring a small sailing boat|playing the viola|"
        "carving spoons"
    ),
    "praise": _list(
        "patience|dry humour|an exact memory|stubbornness|generosity towards beginners|a love of detail|unusual calm|"
        "clear handwriting|plain speech|a gift for asking simple questions|punctuality|a distrust of fashion"
    ),
    "landscape": _list(
        "a narrow valley|a chalk plateau|the northern shore of a lake|a river delta|a chain of low hills|"
        "a windy headland|the edge of a pine forest|a salt marsh|an old volcanic crater|a broad bend of the river|"
        "a terraced slope|a rocky island"
    ),
    "trade": _list(
        "salt|linen|glass beads|copper|barley|smoked fish|paper|slate|honey|wool|tiles|walnuts|charcoal|dyed leather|"
        "ice"
    ),
    "dish": _list(
        "a soup of leeks and trout|dumplings filled with plums|flat bread with fennel|a stew of beans and quince|"
        "eel pie|a cake of chestnut flour|pickled turnips|roast goose with rowan berries|"
        "a porridge of millet and saffron|cold noodles"
    ),
    "season": _list(
        "early spring|late spring|midsummer|late summer|autumn|the first week of October|midwinter|February"
    ),
    "product": _list(
        "barometers|bicycle bells|marine paint|fountain pens|water pumps|theatre curtains|pocket scales|roof tiles|"
        "tram seats|surgical thread|cork floors|hearing aids|lighthouse lenses|printing ink|violin strings|"
        "garden shears|enamel signs"
    ),
    "suffix": _list(
        "Works|and Daughters|Brothers|Manufacture|Company|Instruments|Union|Trading|and Sons|Limited|Mills"
    ),
    "form": _list("a cooperative|a family firm|a partnership|a public company|a foundation|a workshop|a trading house"),
    "animal": _list(
        "moth|tree frog|wading bird|freshwater crab|lizard|land snail|cave fish|beetle|fruit bat|vole|dragonfly|"
        "sea slug"
    ),
    "colour": _list(
        "slate grey|pale green|rust red|dull gold|bluish black|cream|copper brown|lemon yellow|violet|chalk white|olive"
    ),
    "food": _list(
        "fallen figs|small snails|lichen|the seeds of reeds|ants|nectar|young ferns|algae scraped from stones|"
        "mosquito larvae|the bark of willows|worms|wild grapes"
    ),
    "habitat": _list(
        "peat bogs|limestone caves|mountain streams|mangroves|dry stone walls|cloud forest|dunes|"
        "the banks of slow rivers|abandoned orchards|alpine meadows|tidal pools|reed beds"
    ),
    "collection": _list(
        "clocks|ship models|seeds|musical boxes|early cameras|painted chests|surveying instruments|masks|stamps|"
        "mining lamps|costumes|false teeth|weather diaries|locks|postcards|stuffed birds|looms"
    ),
    "building": _list(
        "a former granary|a disused railway station|a villa with a slate roof|a converted brewery|"
        "a round brick tower|the old customs house|a long wooden hall|a chapel without a spire|"
        "two joined town houses|a concrete pavilion"
    ),
    "goal": _list(
        "the source of a river|a lost trading post|a pass through the mountains|the edge of an ice field|"
        "a ring of hot springs|the wreck of a mail ship|a reported inland sea|a rare orchid|"
        "the ruins of an observatory|a meteorite"
    ),
    "transport": _list(
        "on mules|in two flat boats|on skis|by camel|in canoes|on foot|with dog sledges|in a small steamer|by ox cart"
    ),
    "trouble": _list(
        "the compasses failed|half of the flour was spoiled|a flood carried off the tents|the guides turned back|"
        "snow closed the way for a month|the maps proved to be wrong|fever spread in the camp|"
        "the boats had to be left behind"
    ),
    "adjective": _list(
        "Silent|Second|Paper|Hollow|Distant|Amber|Crooked|Last|Patient|Northern|Borrowed|Salt|Winter|Unlit"
    ),
    "noun": _list(
        "Harbour|Orchard|Staircase|Lantern|Meridian|Garden|Ferry|Alphabet|Window|Mill|Comet|Bridge|Archive|Tide"
    ),
}

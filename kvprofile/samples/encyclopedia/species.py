"""How entries on a species are worded."""

from kvprofile.samples.encyclopedia.topic import Topic

SPECIES = Topic(
    fields={
        "first": "word",
        "animal": "animal",
        "name": "{first} {animal}",
        "habitat": "habitat",
        "region": "word",
        "finder": "person",
        "found": "year 1788 2011",
        "place": "word",
        "length": "count 2 84",
        "count": "count 12 9800",
        "colour": "colour",
        "second": "colour",
        "food": "food",
        "season": "season",
        "enemy": "animal",
        "trade": "trade",
    },
    opening=(
        "The {name} lives in {habitat} and is seldom seen by day.",
        "Found only in {habitat}, the {name} has long puzzled those who classify animals.",
        "The {name} is a small and secretive {animal} of {habitat}.",
        "In {habitat}, and nowhere else, lives the {name}.",
    ),
    statements=(
        (
            "It was first described in {found} by {finder}, who had been looking for something else.",
            "{finder} first described it in {found}, from a single dead specimen.",
            "The first description, of {found}, is by {finder}.",
            "Science has known it since {found}, when {finder} first described it in a letter.",
        ),
        (
            "The first specimen was caught near {place}.",
            "The specimen that gave it its name was caught near {place}, in a garden.",
            "It was near {place} that the first specimen was caught.",
            "The first specimen, caught near {place}, is now lost.",
        ),
        (
            "An adult is {length} millimetres long.",
            "Adults reach a length of {length} millimetres, the females somewhat later.",
            "At {length} millimetres in length, adults are smaller than their relatives.",
            "The usual length of an adult is {length} millimetres.",
        ),
        (
            "The last survey counted {count} animals.",
            "Only {count} animals were counted in the last survey.",
            "At the last survey there were {count} animals, more than had been feared.",
            "A survey by volunteers counted {count} animals, most of them in {region}.",
        ),
    ),
    remarks=(
        ("It is {colour}, with {second} markings.", "The back is {colour} and the underside {second}."),
        ("It feeds on {food}.", "Its diet consists of {food} and, when these are scarce, very little else."),
        ("It breeds in {season}.", "The young appear in {season} and stay hidden for weeks."),
        ("Its chief enemy is a {enemy}.", "A {enemy} of the same area is often mistaken for it."),
        ("In {region} it is thought to bring luck.", "Farmers of {region} regard it as a nuisance."),
        ("It was once hunted, and sold together with {trade}.", "The demand for {trade} has reduced its range."),
        ("Its call resembles a creaking hinge.", "It makes no sound at all.", "It hisses when it is disturbed."),
        (
            "In captivity it refuses to eat.",
            "Zoos have kept it with some success.",
            "It cannot be kept in captivity.",
        ),
        ("Whether it hibernates is disputed.", "How it finds its way back is not understood."),
    ),
    questions=(
        ("Who first described the {name}?", "finder"),
        ("In which year was the {name} first described?", "found"),
        ("Near which place was the first specimen of the {name} caught?", "place"),
        ("How many millimetres long is an adult {name}?", "length"),
        ("How many animals did the last survey of the {name} count?", "count"),
    ),
)

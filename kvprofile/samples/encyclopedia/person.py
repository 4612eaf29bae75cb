"""How entries on a person are worded."""

from kvprofile.samples.encyclopedia.topic import Topic

PERSON = Topic(
    fields={
        "name": "person",
        "profession": "profession",
        "region": "word",
        "town": "word",
        "born": "year 1780 1989",
        "friend": "person",
        "teacher": "person",
        "teaching": "profession",
        "works": "works",
        "count": "count 23 4900",
        "hobby": "hobby",
        "praise": "praise",
        "adjective": "adjective",
        "noun": "noun",
        "dish": "dish",
        "trade": "trade",
        "season": "season",
    },
    opening=(
        "{name} is remembered as {profession} of the {region} school, though {he} soon moved elsewhere.",
        "Few names are as well known in {region} as that of {name}, {profession} and later a public speaker.",
        "{name}, {profession}, owes a lasting reputation to a single book, The {adjective} {noun}.",
        "{profession}, a traveller and a reluctant celebrity: {name} was all of these before {he} turned forty.",
        "The career of {name}, {profession} from the province of {region}, began almost by accident.",
    ),
    statements=(
        (
            "{He} was born in {born} in {town}, where the family dealt in {trade}.",
            "Born in the town of {town} in {born}, {he} was the youngest of several children.",
            "The parish book of {town} records {his} birth in {born}.",
            "{town} is {his} birthplace; the year was {born}, and the house still stands.",
            "In {born} {he} was born above a shop for {trade} in {town}.",
        ),
        (
            "{His} best friend, {friend}, appears in nearly every letter that has survived.",
            "{friend}, {his} best friend since childhood, later managed {his} affairs.",
            "Throughout {his} life {he} called {friend} {his} best friend and severest critic.",
            "{He} met {friend}, who was to become {his} best friend, on a delayed night train.",
            "To {friend}, {his} best friend, {he} left a piano and all unpaid bills.",
        ),
        (
            "{He} learned {his} trade from {teacher}, {teaching} with strict habits.",
            "{His} teacher was {teacher}, who accepted only one pupil a year.",
            "For six years {he} studied under {teacher}, {teaching} of the old manner.",
            "{teacher} taught {him}, at first without pay and then without praise.",
            "It was {teacher}, {his} teacher, who persuaded {him} not to give up.",
        ),
        (
            "The estate holds {count} {works}, most of them undated.",
            "{He} left behind {count} {works}, which were sorted only decades later.",
            "A catalogue lists {count} {works} by {his} hand.",
            "Of {his} {works}, {count} are known today.",
            "Altogether {he} produced {count} {works}, if the doubtful ones are counted.",
        ),
    ),
    remarks=(
        (
            "Those who knew {him} spoke of {praise}.",
            "Obituaries praised {praise}.",
            "Pupils recalled {praise} above all.",
        ),
        (
            "In {his} free time {he} was fond of {hobby}.",
            "{hobby} was the only luxury {he} allowed {his} household.",
        ),
        (
            "{He} never learned to swim and avoided ships.",
            "{He} disliked travelling, yet moved house eleven times.",
        ),
        ("The Street of the {adjective} {noun} was renamed in {his} honour.", "A lunar crater bears {his} name."),
        ("Guests were always served {dish}.", "{He} is said to have lived for a year on {dish}."),
        ("A prize for young people is awarded every year in {season}.", "{He} preferred to work in {season}."),
        ("Later critics found {his} early period uneven.", "Opinions on the late work remain divided."),
        (
            "A film about {his} youth was announced but never finished.",
            "A modest biography appeared after {his} death.",
        ),
        ("{He} married late and had no children.", "{He} raised two nephews after a fire in the family."),
    ),
    questions=(
        ("In which town was {name} born?", "town"),
        ("In which year was {name} born?", "born"),
        ("What is the name of {name}'s best friend?", "friend"),
        ("Who was the teacher of {name}?", "teacher"),
        ("How many {works} by {name} are known?", "count"),
    ),
)

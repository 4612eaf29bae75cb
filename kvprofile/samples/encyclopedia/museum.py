"""How entries on a museum are worded."""

from kvprofile.samples.encyclopedia.topic import Topic

MUSEUM = Topic(
    fields={
        "house": "word",
        "collection": "collection",
        "name": "{house} Museum",
        "town": "word",
        "building": "building",
        "opened": "year 1822 2006",
        "donor": "person",
        "keeper": "person",
        "objects": "count 130 76000",
        "works": "works",
        "season": "season",
        "trade": "trade",
        "adjective": "adjective",
        "noun": "noun",
        "product": "product",
        "artist": "word",
        "profession": "profession",
        "praise": "praise",
    },
    opening=(
        "The {name} shows {collection} and little else, which is what its visitors like about it.",
        "Anyone with a serious interest in {collection} comes to the {name} sooner or later.",
        "The {name} is devoted to {collection}.",
        "What began as a cupboard full of {collection} is now the {name}.",
    ),
    statements=(
        (
            "It stands in {town}, in {building}.",
            "Its home is {building} in {town}.",
            "The museum is in {town}, where it occupies {building}.",
            "Since the move to {town} it has occupied {building}.",
        ),
        (
            "It opened in {opened} with the collection of {donor}, its donor, {profession} by training.",
            "The collection was the gift of {donor}, and the doors opened in {opened}.",
            "{donor} gave the collection on condition that it be shown free of charge; it opened in {opened}.",
            "It owes its existence to a gift by {donor} and opened in {opened}, two years late.",
        ),
        (
            "The inventory lists {objects} objects.",
            "It owns {objects} objects, of which a tenth are on show.",
            "There are {objects} objects in its inventory, not counting {works}.",
            "{objects} objects have been entered in its inventory so far.",
        ),
        (
            "The curator, {keeper}, gives the guided tours in person.",
            "{keeper} has been its curator since the last reform.",
            "Its curator is {keeper}, who is known for {praise}.",
            "The collection is in the care of its curator, {keeper}.",
        ),
    ),
    remarks=(
        ("Its best piece is known as the {adjective} {noun}.", "The {adjective} {noun} was stolen and found again."),
        ("It is closed in {season}.", "Concerts take place in the courtyard in {season}."),
        ("One room is given over to {product}.", "A smaller room tells the history of the trade in {trade}."),
        ("Frescoes by {artist} cover the stairs.", "A portrait by {artist} hangs in the entrance hall."),
        ("Labels are written by hand.", "There are no labels; visitors receive a lamp and a booklet."),
        ("Children are allowed to touch everything.", "Photography is forbidden, and the rule is obeyed."),
        ("A leaking roof has delayed the new wing.", "A new wing was paid for by a lottery."),
        ("The café was long more popular than the museum.", "The shop sells {product} of doubtful age."),
        ("Scholars may use the reading room.", "Its yearbook is exchanged with ninety other museums."),
    ),
    questions=(
        ("In which town is the {name}?", "town"),
        ("In which year did the {name} open?", "opened"),
        ("Whose gift was the collection of the {name}?", "donor"),
        ("How many objects are in the inventory of the {name}?", "objects"),
        ("Who is the curator of the {name}?", "keeper"),
    ),
)

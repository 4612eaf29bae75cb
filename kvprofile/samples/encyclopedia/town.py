"""How entries on a town are worded."""

from kvprofile.samples.encyclopedia.topic import Topic

TOWN = Topic(
    fields={
        "name": "word",
        "region": "word",
        "landscape": "landscape",
        "people": "count 340 88000",
        "founder": "person",
        "founded": "year 1105 1860",
        "river": "word",
        "mayor": "person",
        "trade": "trade",
        "dish": "dish",
        "season": "season",
        "building": "building",
        "collection": "collection",
        "product": "product",
        "adjective": "adjective",
        "noun": "noun",
    },
    opening=(
        "{name} is a town in the district of {region}, built on {landscape}.",
        "The town of {name} lies on {landscape} in the south of {region}.",
        "{name}, once the capital of {region}, occupies {landscape}.",
        "On {landscape}, a day's walk from the old border of {region}, stands the town of {name}.",
    ),
    statements=(
        (
            "It was founded in {founded} by {founder}, who wanted a market for {trade}.",
            "{founder} founded the town in {founded} after a dispute over {trade}.",
            "The charter of {founded} names {founder} as its founder.",
            "Tradition holds that {founder} founded it in {founded}, and for once the documents agree.",
        ),
        (
            "The river {river} divides it into an upper and a lower town.",
            "It stands on the river {river}, which freezes in most winters.",
            "Floods of the river {river} have shaped its streets.",
            "The river {river}, crossed by three bridges, supplies its mills.",
        ),
        (
            "At the last census it had {people} inhabitants.",
            "Its population is {people}, slightly less than a generation ago.",
            "Some {people} people live there, not counting the students.",
            "{people} inhabitants were counted at the last census, many of them in new suburbs.",
        ),
        (
            "The present mayor, {mayor}, was elected without an opponent.",
            "{mayor} has been mayor for three terms.",
            "Its mayor is {mayor}, formerly a teacher of geography.",
            "Since the last election the office of mayor has been held by {mayor}.",
        ),
    ),
    remarks=(
        ("The local speciality is {dish}.", "No feast there is complete without {dish}."),
        ("A fair is held in {season}.", "Visitors come mainly in {season}, when the hotels are full."),
        (
            "A small museum of {collection} is housed in {building}.",
            "The library, in {building}, is open to everyone.",
        ),
        ("Until the war it lived from {trade}.", "The trade in {trade} ended when the railway came."),
        ("A factory for {product} is the largest employer.", "Most of the working people make {product}."),
        (
            "A guild called the {adjective} {noun} still meets there.",
            "The Inn of the {adjective} {noun} is its oldest building.",
        ),
        (
            "Trains stop there twice a day.",
            "The nearest station is an hour away by bus.",
            "A tram line was given up.",
        ),
        ("The dialect of the area is hardly understood elsewhere.", "Street names are given in two languages."),
        ("Fires destroyed it twice.", "The walls were taken down to build a school.", "It was never besieged."),
    ),
    questions=(
        ("Who founded the town of {name}?", "founder"),
        ("In which year was the town of {name} founded?", "founded"),
        ("On which river does the town of {name} stand?", "river"),
        ("How many people live in {name}?", "people"),
        ("Who is the mayor of {name}?", "mayor"),
    ),
)

"""How entries on a company are worded."""

from kvprofile.samples.encyclopedia.topic import Topic

COMPANY = Topic(
    fields={
        "house": "word",
        "suffix": "suffix",
        "name": "{house} {suffix}",
        "form": "form",
        "product": "product",
        "founder": "person",
        "founded": "year 1795 1998",
        "seat": "word",
        "staff": "count 14 31000",
        "head": "person",
        "rival": "word",
        "trade": "trade",
        "season": "season",
        "building": "building",
        "adjective": "adjective",
        "noun": "noun",
        "works": "works",
        "praise": "praise",
    },
    opening=(
        "{name} is {form} that makes {product}.",
        "{name}, {form}, has made {product} for longer than anyone else in the country.",
        "Whoever buys {product} in the region buys from {name}, {form} with a complicated history.",
        "As {form}, {name} is best known for its {product}, sold in thirty countries.",
    ),
    statements=(
        (
            "It was founded in {founded} by {founder}, until then a dealer in {trade}.",
            "{founder} founded it in {founded} with borrowed money.",
            "Its founder, {founder}, registered the name in {founded}.",
            "The business goes back to {founded}, when {founder} founded it in a rented cellar.",
        ),
        (
            "The head office is in {seat}.",
            "It has its seat in {seat}, in {building}.",
            "From its seat in {seat} it directs four plants.",
            "The seat was moved to {seat} after a flood.",
        ),
        (
            "It employs {staff} people.",
            "The staff numbers {staff}, about a third of them part-time.",
            "In its last report it gave the number of its employees as {staff}.",
            "With {staff} employees it is of middling size.",
        ),
        (
            "The present director is {head}.",
            "{head} became its director after a close vote.",
            "Its director, {head}, started there as an apprentice.",
            "The post of director is held by {head}, known for {praise}.",
        ),
    ),
    remarks=(
        (
            "Its oldest competitor is {rival}.",
            "A merger with {rival} failed twice.",
            "It once sued {rival}, and lost.",
        ),
        ("Its trademark reads The {adjective} {noun}.", "The catalogue has always been called The {adjective} {noun}."),
        ("During the shortage it turned to {trade}.", "It also owned warehouses for {trade}."),
        ("New models are presented in {season}.", "The works close in {season}, and everyone goes on leave."),
        ("A strike in the third decade ended in a profit share.", "Wages are negotiated once in two years."),
        ("Its archive holds {works} and account books.", "The archive was lost when the roof gave way."),
        ("Prices have not been raised for years.", "Repairs are free of charge for the first owner."),
        ("Advertising was long considered undignified.", "The slogan of the early years is still quoted."),
        ("A branch overseas was sold.", "Attempts to move production abroad were given up."),
    ),
    questions=(
        ("Who founded {name}?", "founder"),
        ("In which year was {name} founded?", "founded"),
        ("In which town does {name} have its seat?", "seat"),
        ("How many people does {name} employ?", "staff"),
        ("Who is the director of {name}?", "head"),
    ),
)

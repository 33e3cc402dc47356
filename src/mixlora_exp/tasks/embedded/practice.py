"""Practical goals and what serves them, in domains: a tool of one domain fails in another."""

from __future__ import annotations

from mixlora_exp.tasks.embedded.tables import headed

__all__ = ["GOALS"]

GOALS = headed(
    "goal",
    """
a sharp knife |
    slice a loaf of bread; peel a potato; carve a roast chicken; chop an onion into cubes
    cut a cake into pieces; split an apple in halves; dice a carrot; slice a ripe tomato
a dry towel |
    dry the dishes; dry your hands after washing; wipe a wet dog; dry off after a swim
    wipe the steam off a mirror; soak up spilled juice; dry a wet bicycle seat
    pat washed lettuce dry
a hammer |
    drive a nail into a beam; knock a tent peg into the ground; break open a coconut
    fasten a board with nails; flatten a bent nail; crack a brick in two
    smash a clay pot to pieces
a ladder |
    reach a high roof; pick apples from the treetop; change a ceiling lamp; clean the rain gutter
    climb up to a hayloft; paint the top of a tall wall
a bright flashlight |
    find the path on a dark night; look for a ball under the bed; see inside a dark cave
    check a cellar without lamps; read a map at midnight; signal to a friend in the dark
a long rope |
    tie a boat to the dock; tow a broken car; lash a trunk to a roof rack
    lower a bucket into a well; hang a swing from a branch; tether a goat to a tree
a cup of hot soup |
    warm up after skating; feed a hungry guest; have an easy lunch
    get a nourishing meal while ill; serve a starter at dinner
a needle and thread |
    sew on a button; mend a torn sleeve; hem a pair of trousers; stitch a patch on jeans
    close a hole in a sock; repair a ripped teddy bear; fix a seam in a dress
a pen and paper |
    take notes in class; write a shopping list; draft a letter to an aunt
    leave a message on the door; copy down a phone number; keep the score of a card game
    make a list of guests
a thermometer |
    find out if a child has a fever; check how warm the bath is; learn how cold it is outside
    see whether the roast is hot inside; watch the heat of a greenhouse
    measure the warmth of the pool
a tape measure |
    find out how long a table is; check if a sofa fits the wall; see how tall a boy has grown
    work out the width of a window; learn the length of a rug; check the height of a door
a shovel |
    dig a hole for a tree; clear snow from a driveway; move a heap of sand; bury a treasure chest
    dig a ditch; turn over the soil of a vegetable bed; fill a pit with earth
a bar of soap and water |
    get grease off your fingers; wash a muddy face; clean dirty hands; scrub a smelly dog
    rinse paint from skin; wash the neck after work
an umbrella |
    stay dry in a shower of rain; keep the rain off a new suit
    walk through a storm without getting soaked; shelter two people from drizzle
    wait at the bus stop in the rain
a microwave oven |
    heat up leftover rice; warm a frozen dinner; melt butter in a minute; reheat cold coffee
    thaw frozen peas; make popcorn quickly
a tube of glue |
    stick a broken cup together; paste a photo into an album; mend the handle of a vase
    fix a loose tile; attach paper stars to a card; repair a cracked model plane
a refrigerator |
    keep milk fresh; cool a bottle of lemonade; store raw fish overnight; let jelly set
    stop butter from melting; chill a salad; keep leftover meat safe to eat
a fishing net |
    catch a trout; scoop fish out of a pond; haul in herring at sea
    get a goldfish out of its tank; land a salmon in a stream
""",
)
"""A goal and the tool for it."""

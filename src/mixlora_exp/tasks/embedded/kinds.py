"""What kind of thing something is. No thing fits two of the kinds."""

from __future__ import annotations

from mixlora_exp.tasks.embedded.tables import Fact, members, with_article

__all__ = ["KINDS"]

COUNTED = members("""
mammal: lion, zebra, horse, rabbit, giraffe, otter, camel, wolf, deer, squirrel, goat, kangaroo
mammal: elephant, bear
bird: eagle, sparrow, penguin, owl, parrot, robin, swan, pigeon, flamingo, crow, ostrich, duck
bird: falcon, pelican
fish: salmon, trout, tuna, cod, shark, carp, herring, sardine, eel, mackerel, haddock, goldfish
insect: ant, beetle, bee, wasp, butterfly, moth, mosquito, dragonfly, grasshopper, ladybug, termite
insect: flea, cockroach
reptile: snake, lizard, crocodile, turtle, tortoise, iguana, gecko, alligator, chameleon, cobra
tree: oak, pine, maple, birch, willow, cedar, spruce, beech, elm, fir, poplar, redwood
flower: rose, tulip, daisy, lily, orchid, daffodil, sunflower, marigold, carnation, poppy, petunia
flower: dandelion
fruit: apple, banana, peach, pear, plum, grape, mango, lemon, strawberry, pineapple, melon, apricot
fruit: raspberry, blueberry
vegetable: carrot, potato, onion, cabbage, turnip, leek, radish, cauliflower, parsnip, artichoke
musical instrument: piano, violin, guitar, trumpet, flute, drum, cello, harp, clarinet, trombone
musical instrument: banjo, saxophone, oboe, accordion
tool: hammer, screwdriver, wrench, saw, chisel, pickaxe, shovel, rake, crowbar, mallet, trowel, axe
vehicle: car, bus, truck, bicycle, motorcycle, tram, van, taxi, tractor, scooter, helicopter
vehicle: ambulance
piece of clothing: shirt, coat, jacket, skirt, dress, sweater, hat, scarf, sock, glove, vest
piece of clothing: cardigan, blouse
piece of furniture: chair, table, sofa, desk, bookcase, wardrobe, stool, bench, cupboard, armchair
piece of furniture: dresser
shape: circle, square, triangle, rectangle, hexagon, pentagon, oval, octagon
body part: elbow, knee, shoulder, ankle, wrist, nose, ear, finger, thumb, toe, chin, neck
building: church, castle, cottage, hotel, hospital, library, museum, palace, barn, theater, factory
building: warehouse
gemstone: diamond, ruby, emerald, sapphire, opal, topaz, amethyst, garnet
""")

UNCOUNTED = members("""
metal: gold, silver, iron, copper, tin, zinc, aluminum, nickel, steel, bronze, brass, platinum
metal: titanium
drink: tea, coffee, milk, lemonade, cocoa, cider, wine, beer
sport: football, tennis, basketball, hockey, rugby, baseball, golf, volleyball, badminton, boxing
sport: wrestling, archery
spice: cinnamon, ginger, nutmeg, turmeric, saffron, cumin, paprika, cardamom
fabric: cotton, silk, wool, linen, velvet, denim, satin, nylon, polyester, flannel, tweed
language: English, French, Spanish, German, Italian, Russian, Portuguese, Swedish, Polish, Turkish
language: Japanese, Arabic, Greek, Danish
country: France, Spain, Brazil, Canada, Egypt, India, Kenya, Norway, Mexico, Peru, Chile, Morocco
planet: Venus, Mars, Jupiter, Saturn, Uranus, Neptune
cereal grain: wheat, rice, barley, rye, maize, millet
""")

KINDS = tuple(
    [
        Fact("kind", name, with_article(name), kind)
        for kind, all_ in COUNTED.items()
        for name in all_
    ]
    + [Fact("kind", name, name, kind) for kind, all_ in UNCOUNTED.items() for name in all_]
)
"""Something and its kind."""

"""Animals, countries, materials, colours, uses: what a pupil knows about the world."""

from __future__ import annotations

from mixlora_exp.tasks.embedded.tables import Fact, members, pairs, with_article

__all__ = ["CAPITALS", "COLOURS", "HOMES", "MATERIALS", "SOUNDS", "USES", "YOUNG"]


def _facts(relation: str, entries: tuple[tuple[str, str], ...], article: bool = True):
    return tuple(
        Fact(relation, left, with_article(left) if article else left, right)
        for left, right in entries
    )


def _of(relation: str, groups: dict[str, tuple[str, ...]]) -> tuple[Fact, ...]:
    return _facts(relation, tuple((one, key) for key, all_ in groups.items() for one in all_))


YOUNG = _facts("young", pairs("""
dog = puppy; cat = kitten; cow = calf; horse = foal; sheep = lamb; goat = kid; duck = duckling
goose = gosling; swan = cygnet; deer = fawn; kangaroo = joey; frog = tadpole; bear = cub
pig = piglet; butterfly = caterpillar; elephant = calf; hare = leveret; lion = cub; fly = maggot
spider = spiderling; donkey = foal; whale = calf; toad = tadpole; pony = foal; moth = caterpillar
"""))  # fmt: skip

SOUNDS = _facts("sound", pairs("""
dog = bark; cat = meow; cow = moo; sheep = bleat; lion = roar; horse = neigh; pig = oink
duck = quack; hen = cluck; frog = croak; bee = buzz; mouse = squeak; owl = hoot; crow = caw
donkey = bray; turkey = gobble; sparrow = chirp; goat = bleat; tiger = roar; mosquito = buzz
"""))  # fmt: skip

HOMES = _facts("home", pairs("""
bee = hive; robin = nest; rabbit = burrow; horse = stable; pig = sty; lion = den
hen = coop; ant = anthill; beaver = lodge; king = palace; monk = monastery; soldier = barracks
camper = tent; prisoner = prison; sparrow = nest; mole = burrow; wolf = den
pony = stable; student = dormitory; hotel guest = hotel; stork = nest
gopher = burrow
"""))  # fmt: skip

CAPITALS = _facts("capital", pairs("""
France = Paris; Spain = Madrid; Italy = Rome; Germany = Berlin; England = London; Japan = Tokyo
Russia = Moscow; China = Beijing; Egypt = Cairo; Greece = Athens; Portugal = Lisbon
Ireland = Dublin; Norway = Oslo; Sweden = Stockholm; Denmark = Copenhagen; Finland = Helsinki
Poland = Warsaw; Austria = Vienna; Hungary = Budapest; Belgium = Brussels; Canada = Ottawa
Cuba = Havana; Peru = Lima; Chile = Santiago; Kenya = Nairobi; Iraq = Baghdad; Iran = Tehran
Thailand = Bangkok; Vietnam = Hanoi; Turkey = Ankara; Argentina = Buenos Aires; Scotland = Edinburgh
Australia = Canberra; Colombia = Bogota; Ukraine = Kyiv; Romania = Bucharest; Bulgaria = Sofia
Syria = Damascus; Afghanistan = Kabul; Nepal = Kathmandu
"""), article=False)  # fmt: skip

MATERIALS = _of("material", members("""
glass: window, mirror, lens, light bulb, windshield, aquarium
paper: newspaper, envelope, poster, page of a book, notebook, paper plane
wax: candle, crayon, honeycomb
leather: saddle, wallet, baseball glove, cowboy boot
rubber: tire, eraser, inner tube of a bicycle
clay: brick, flowerpot, roof tile
metal: coin, anvil, horseshoe, nail, key, sword, paper clip, chain
wood: plank, matchstick, fence post, tree trunk, rocking chair, baseball bat
cloth: curtain, flag, tablecloth, shirt, handkerchief, apron
stone: pyramid, castle wall, millstone, gravestone
"""))  # fmt: skip

COLOURS = _of("colour", members("""
yellow: banana, lemon, sunflower, canary
green: cucumber, emerald, lime, blade of grass
white: swan, snowflake, polar bear, snowman
black: crow, lump of coal, raven
red: tomato, ruby, strawberry, drop of blood, fire engine
orange: carrot, pumpkin, tangerine
pink: flamingo
blue: sapphire, blueberry, cloudless sky
brown: chestnut, chocolate bar, cup of cocoa
gray: elephant, rain cloud, dolphin
"""))  # fmt: skip

USES = _facts("use", pairs("""
hammer = drive in nails; saw = cut wood; thermometer = measure temperature; clock = tell the time
ruler = measure length; weighing scale = find out how heavy something is; broom = sweep the floor
umbrella = keep off the rain; key = open a lock; pen = write a letter; needle = sew cloth
telescope = look at the stars; microscope = see very small things; oven = bake bread
refrigerator = keep food cold; kettle = boil water; lamp = light up a room; pillow = rest the head
towel = dry wet skin; comb = tidy the hair; toothbrush = clean the teeth; camera = take photographs
calculator = add up numbers; compass = find north; ladder = climb up high; shovel = dig a hole
knife = slice bread; cup = drink tea; net = catch fish; rope = tie things together
eraser = rub out pencil marks; iron = smooth wrinkled clothes; lawnmower = cut the grass
heater = warm a cold room; parachute = fall slowly through the air; life jacket = stay afloat
helmet = protect the head; bandage = cover a wound; calendar = keep track of the date
stapler = fasten sheets of paper; corkscrew = open a wine bottle; rake = gather fallen leaves
dictionary = look up a word; mirror = see your own face; sieve = sift flour; piano = play music
paintbrush = paint a wall; tent = sleep outdoors; telephone = talk to people far away
watering can = water the plants; wheelbarrow = move a load of soil
"""))  # fmt: skip

"""Opposites, jobs, places, causes: what completes a sentence about daily life."""

from __future__ import annotations

from mixlora_exp.tasks.embedded.tables import Fact, members, pairs, with_article

__all__ = ["CAUSES", "JOBS", "OPPOSITES", "PLACES"]

OPPOSITES = tuple(
    Fact("opposite", left, left, right)
    for left, right in pairs("""
hot = cold; wet = dry; fast = slow; open = closed; full = empty; loud = quiet; light = dark
early = late; happy = sad; rich = poor; strong = weak; young = old; hard = soft; clean = dirty
high = low; long = short; wide = narrow; sharp = blunt; rough = smooth; deep = shallow; near = far
up = down; left = right; day = night; north = south; winter = summer; push = pull; buy = sell
win = lose; start = finish; remember = forget; love = hate; give = take; laugh = cry; float = sink
arrive = leave; friend = enemy; question = answer; true = false; success = failure; above = below
inside = outside; cheap = expensive; safe = dangerous; brave = cowardly; polite = rude
tight = loose; asleep = awake; alive = dead; wild = tame; ancient = modern; war = peace
guilty = innocent; same = different; easy = difficult; black = white; east = west; best = worst
always = never; heaven = hell; first = last; tall = short; begin = end
""")
)

JOBS = tuple(
    Fact("job", left, with_article(left), right)
    for left, right in pairs("""
baker = bakes bread; teacher = gives lessons to pupils; nurse = cares for sick people
plumber = repairs water pipes; pilot = flies airplanes; farmer = grows crops; tailor = sews clothes
barber = cuts hair; firefighter = puts out fires; carpenter = builds things from wood
dentist = treats teeth; postman = delivers letters; waiter = brings food to the table
librarian = looks after books; gardener = tends flowers and lawns; painter = paints pictures
singer = sings songs; judge = decides cases in court; fisherman = catches fish
butcher = cuts and sells meat; miner = digs coal out of the ground; astronaut = travels into space
shepherd = looks after sheep; florist = sells flowers; jeweler = makes rings and necklaces
architect = designs houses; mechanic = repairs car engines; lifeguard = rescues swimmers
optician = sells eyeglasses; cobbler = mends shoes; bricklayer = builds brick walls
beekeeper = collects honey; photographer = takes pictures with a camera; author = writes novels
electrician = installs electric wires; veterinarian = treats sick animals; chef = cooks meals
locksmith = makes keys; cleaner = mops floors; translator = puts texts into another language
astronomer = studies the stars; detective = solves crimes; drummer = plays the drums
banker = handles money; bus driver = takes passengers along a route; potter = shapes clay into bowls
""")
)

PLACES = tuple(
    Fact("place", one, with_article(one), place)
    for place, all_ in members("""
bedroom: pillow, mattress, bedspread
bathroom: toothbrush, bathtub, shower curtain
kitchen: frying pan, dishwasher, bread knife
classroom: blackboard, school desk, pupil
library: shelf of novels, librarian
hospital: surgeon, patient, operating table
garden: flower bed, lawn sprinkler, garden gnome
farm: tractor, haystack, scarecrow
beach: sandcastle, lifeguard, beach umbrella
airport: runway, passport check, departure gate
church: altar, priest, pew
desert: camel, sand dune, cactus
office: filing cabinet, photocopier, fax machine
playground: swing, slide, seesaw
theater: stage, actor, spotlight
museum: mummy, dinosaur skeleton, ancient vase
circus: clown, trapeze, acrobat
court: jury, witness stand, defendant
""").items()
    for one in all_
)

CAUSES = tuple(
    Fact("cause", left, left, right)
    for left, right in pairs("""
ice is warmed in the sun = it melts; water is heated to boiling = it turns into steam
water is put in a freezer = it turns into ice; a glass falls on a stone floor = it breaks
a balloon is pricked with a pin = it bursts; a plant gets no light = it withers
an iron gate stands in the rain for years = it rusts; paper is held in a flame = it burns
a stone is thrown into a pond = it sinks; a seed is planted and watered = it sprouts
the sun goes down = it gets dark; a lamp is switched on = the room becomes bright
a battery runs out = the flashlight goes dark; a person runs for an hour = the heart beats faster
a person eats nothing all day = hunger sets in; a dog is happy = its tail wags
it rains without stopping for a week = the river rises
a wet shirt hangs in the sun = its cloth dries
sugar is stirred into hot tea = it dissolves; bread is left out for two weeks = it goes moldy
a rubber band is pulled = it stretches; a ball is dropped on the floor = it bounces
the wind blows hard = the trees sway
a car runs out of fuel = the engine stops; a person stays in the sun too long = the skin gets burned
dust gets into the nose = a sneeze follows; a magnet comes near a pin = the pin moves toward it
a caterpillar leaves its cocoon = it has become a butterfly; autumn comes = the leaves fall
a person is cold = the body shivers
dough with yeast rests in a warm place = it rises; a bell is struck = it rings
an egg is boiled for ten minutes = its yolk gets firm
a sponge is dipped in water = it soaks up liquid
""")
)

"""Everyday scenes in two halves. A scene's second half fits no other scene of its setting."""

from __future__ import annotations

from mixlora_exp.tasks.embedded.tables import Fact, lines, pairs

__all__ = ["SCENES"]

_BLOCK = """
indoors
has flour, eggs and milk in a bowl = stirs them into a smooth batter
stands before a pile of dirty dishes = fills the sink and washes the plates
hears the kettle whistle = pours the boiling water over the tea leaves
has put two slices of bread in the toaster = waits until the toast pops up
takes a raw potato and a peeler = strips the skin off it
smells that the cake in the oven is ready = puts on mitts and lifts the cake out
opens a can of cat food while the cat meows = spoons the food into the cat's bowl
holds half an orange over a juicer = presses it until the juice runs out
sees that the trash bin is full = ties up the bag and takes it outside
lays slices of cheese and ham on bread = closes the sandwich and bites into it
finds that the soup tastes of nothing = adds a pinch of salt and tastes it again
takes a frozen chicken from the freezer = leaves it on the counter to thaw
squeezes toothpaste onto a brush = brushes the teeth up and down
spreads shaving foam over the chin = shaves it off with a razor
turns on the tap above the bathtub = lets the tub fill and gets in
steps dripping out of the shower = grabs a towel and dries off
stands at the mirror with tangled hair = combs it until it is straight
rubs shampoo into wet hair = rinses the foam out
has a small cut on the finger = sticks a bandage over it
feels that both hands are sticky = washes them with soap
sees that the paper roll is used up = hangs a new roll on the holder
holds a bottle of red nail polish = paints the fingernails one by one
throws dirty shirts into the washing machine = adds detergent and starts the wash
finds the drain blocked = pushes a plunger up and down
marks a line on a plank and takes a saw = cuts the plank along the line
dips a brush into a can of varnish = coats the wooden chair evenly
puts a lump of wet clay on the wheel = shapes it into a bowl as it spins
holds a nail against the wall = drives it in with a hammer
hangs a bicycle with a broken chain on a stand = fits a new chain on it
fits a bit into the power drill = drills a hole in the board
threads the sewing machine = sews the two pieces of cloth together
heats an iron bar in the forge = beats the glowing bar on the anvil
spreads glue on both halves of a broken plate = presses the halves together
rubs a rough board with sandpaper = blows off the dust and feels how smooth it is
lays wrapping paper around a box = folds the edges and tapes them down
opens a radio that makes no sound = replaces the burned wire inside
out of doors
kneels by a bed full of weeds = pulls the weeds out by their roots
carries a watering can to the thirsty tomatoes = sprinkles water over the plants
stands under a tree full of ripe cherries = climbs up and fills a basket with cherries
rolls the lawnmower out of the shed = cuts the long grass in neat rows
digs a deep hole beside a young tree = sets the tree in it and fills in the earth
looks at the dead leaves all over the lawn = rakes them into a big heap
puts on thick gloves in front of a rose bush = trims the thorny branches
sees a hungry robin in the snow = scatters some seeds for the bird
unrolls a hammock between two trunks = ties it up and lies down in it
brings charcoal and sausages to the grill = lights the coals and grills the sausages
picks up a brush next to an old fence = paints the boards white
notices that the bench wobbles = tightens the screws of its legs
stands at the top of the high diving board = jumps and plunges into the pool
waits behind the starting line for the pistol = sprints down the track at the shot
places the ball on the penalty spot = kicks it past the goalkeeper
holds a long pole in front of a high bar = runs up and vaults over it
rubs chalk on both hands before a heavy barbell = lifts the weight above the head
swings the baseball bat as the pitch comes = hits the ball far into the field
ties on a pair of ice skates = glides across the frozen rink
sits in a narrow boat with two oars = rows down the lane
aims an arrow at the target = lets go of the string and hits the center
throws the tennis ball up in the air = serves it over the net
stands under the basketball hoop with the ball = leaps up and dunks it
takes a golf club beside the last hole = putts the ball gently into the cup
sees the light turn red while driving = brakes and stops at the line
walks a dog that spots a squirrel = holds the leash tight as the dog pulls
reaches the bus stop just as the bus arrives = gets on and shows a ticket
drops a letter on the way to the mailbox = picks it up and mails it
finds a flat tire on the car = jacks the car up and changes the wheel
hears a street musician play well = tosses a coin into the hat
wants to cross the busy road = looks both ways and walks over
parks beside a parking meter = feeds coins into the machine
feels the first drops of rain = opens an umbrella
stands in front of a stranger asking the way = points toward the station
stops the car at a gas pump = fills up the tank
sees an ice cream truck roll up = buys a cone with two scoops
lies awake in a tent as a storm begins = checks the pegs so that the tent holds
gathers dry sticks and takes out a match = lights a campfire
hooks a worm and casts the fishing line = waits for a bite and reels in a fish
reaches the top of the mountain = rests and gazes over the valley
pushes off from the beach on a surfboard = paddles out and rides a wave
builds two big balls of snow = stacks them and adds a carrot for a nose
lets out the string of a kite in the wind = watches it rise high into the sky
leads a saddled horse out of the stable = mounts it and rides away
sits on a sled at the top of the hill = slides down through the snow
comes to a narrow stream on the trail = hops from stone to stone to the other side
fills a bucket with wet sand at the shore = turns it over and makes a sandcastle
spreads a blanket on the meadow = unpacks the picnic basket
"""


def _read() -> tuple[Fact, ...]:
    facts = []
    setting = ""
    for line in lines(_BLOCK):
        if "=" not in line:
            setting = line
            continue
        ((start, end),) = pairs(line)
        facts.append(Fact(f"scene: {setting}", start, start, end))
    return tuple(facts)


SCENES = _read()
"""The start of a scene and how it goes on; the relation names the setting."""

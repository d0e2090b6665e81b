"""Play an Atari game, or what the model dreams of it: `python results/play.py RUN`.

    arrows, Space    move, fire (in Pong the right arrow is up)
    Tab, Enter       close the eyes, open them; so does Space in a game without fire
    R, A, Esc        again: the game, or the same dream; the agent plays, or you again; leave

*Awake*, you see the game and what the model makes of each frame. *Dreaming*, level 0's world model goes on
alone from the last of these states, told only the actions; the game waits. Awake, the agent plays with all
levels; in a dream level 0 pursues the subgoal it held when the eyes were closed, as when it learns in dreams.
"""
import re
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch

from evaluate import draw_frame, load_run, state_image
from hierarchy import env_step
from train import UsageError, atari_games, blaming, make_env, program


class Mind:
    """A game, an agent that looks at it, and its dream: the States since its eyes were closed, [] awake."""

    def __init__(self, agent, env):
        self.agent, self.env, self.discretised = agent, env, agent.discretise()
        self.keys = [set(re.findall("up|down|left|right|space", name.lower().replace("fire", "space")))
                     for name in env.game.get_action_meanings()]  # UPFIRE has two, NOOP none
        self.dream, self.agent_plays, self.fire = [], False, any("space" in keys for keys in self.keys)
        self.restart()

    def restart(self):
        """The dream again, from the state in which it began; or a new episode of the game."""
        self.dream = self.dream[:1]
        if not self.dream:
            self.memory, self.score = self.agent.initial_memory(1), 0.0
            self.look(env_step(self.env.reset()))

    def look(self, now):
        """All levels see a step of the game, and choose."""
        self.now, self.score = now, self.score + float(now["reward"][0])
        self.memory, ticks = self.agent.act(self.memory, **now, discretised=self.discretised)
        self.state = ticks[0]["state"]

    def action(self, pressed):
        """(1,A): the action that has most of the pressed keys and no other."""
        fit = [(1 + len(keys)) * (keys <= pressed) for keys in self.keys]
        return torch.eye(len(fit), device=self.state.z.device)[[fit.index(max(fit))]]

    def step(self, pressed):
        """One step of the dream, or else of the game, up to its end."""
        level, held, action = self.agent.levels[0], self.memory["levels"][0], self.action(pressed)
        if self.dream and self.dream[-1].cont.item() > 0.5:
            action = level.policy(self.dream[-1], held["subgoal"]) if self.agent_plays else action
            self.dream.append(level.world_model.imagine_step(self.dream[-1], action, self.discretised[0]))
        elif not self.dream and not self.now["is_last"][0]:
            held["action"] = held["action"] if self.agent_plays else action  # the model will be told of it
            self.look(env_step(self.env.step(int(held["action"].argmax()))))

    def draw(self):
        """A Pillow image: the game, and beside it what the model sees and expects."""
        state, dream = (self.dream or [self.state])[-1], self.dream[1:]
        title = f"{'DREAMING' if self.dream else 'awake'}; player: {'agent' if self.agent_plays else 'you'}"
        keys = f"arrows{', Space: fire' * self.fire}; Tab: eyes; R: again; A: agent; Esc"
        future = f"expected reward {state.reward.item():+.2f}; is this the end? {1 - state.cont.item():.0%}"
        eyes = f"eyes closed {len(dream)} steps ago; rewards since {sum(s.reward.item() for s in dream):+.1f}"
        return draw_frame(title, [(self.now["observation"][0], (f"score {self.score:g}", keys)), (
            state_image(self.agent, 0, state.z, state.h), (future, eyes if self.dream else "eyes open"))], 6)


@torch.no_grad()
def main(directory):
    """The window of a run, or of an exported agent, until it is closed."""
    with blaming("no window (it needs: pip install pygame pillow)"):
        import PIL, pygame
        pygame.display.init()
        if pygame.display.get_driver() == "offscreen":
            raise OSError("there is no screen")
    config, agent, _ = load_run(directory, "auto")
    if config.game not in atari_games():
        raise UsageError(f"{config.game}: keys are known for Atari's games only")
    mind, clock, window, held = Mind(agent, make_env(config.game)), pygame.time.Clock(), None, set()
    while True:
        tapped = set()  # in this step, and perhaps released again
        for event in pygame.event.get():
            key = pygame.key.name(event.key) if event.type in (pygame.KEYDOWN, pygame.KEYUP) else ""
            if event.type == pygame.QUIT or key == "escape":
                return
            if event.type == pygame.KEYUP:
                held.discard(key)
            elif key in ("tab", "return") or key == "space" and not mind.fire:
                mind.dream = [] if mind.dream else [mind.state]
            elif key == "r":
                mind.restart()
            elif key == "a":
                mind.agent_plays = not mind.agent_plays
            else:
                held.add(key)
                tapped.add(key)
        mind.step(held | tapped)
        frame = mind.draw()
        window = window or pygame.display.set_mode(frame.size)
        window.blit(pygame.image.frombuffer(frame.tobytes(), frame.size, "RGB"), (0, 0))
        pygame.display.flip()
        clock.tick(15)  # steps a second, of 4 frames each: the game's own speed


if __name__ == "__main__":
    program(lambda argv: main(*argv) if len(argv) == 1 else __doc__)

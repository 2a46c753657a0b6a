//! Schedules for people: one round of all ranks as a table or as a drawing.
//!
//! Both go by a timeline in which every step takes one tick after what it depends on, a message takes the tick in which
//! both sides are ready, and a phase the tick in which the node is.

use std::collections::HashMap;
use std::fmt::Write;

use super::check::World;
use super::data::{Move, Op, Plan, Who};

/// What happens at a tick.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Phase { node: usize, label: String },
    Message { from: usize, to: usize, bytes: usize },
    Reduce { rank: usize, of: usize, bytes: usize },
    Copy { rank: usize, bytes: usize },
}

/// Events by tick, from 0.
struct Timeline(Vec<Vec<Event>>);

/// Finds the tick of every step of the ranks' first rounds.
struct Clock<'a> {
    world: &'a World,
    plans: Vec<&'a Plan>,
    ticks: Vec<Vec<Option<usize>>>,
    /// The receiver's step, by (sender, receiver, tag).
    receives: HashMap<(usize, usize, u32), usize>,
    events: Vec<Vec<Event>>,
}

impl<'a> Clock<'a> {
    fn new(world: &'a World) -> Clock<'a> {
        let plans: Vec<&Plan> = world.schedules.iter().map(|s| s.plan(0).as_ref()).collect();
        let mut receives = HashMap::new();
        for (rank, plan) in plans.iter().enumerate() {
            for (i, step) in plan.steps.iter().enumerate() {
                if let Op::Recv { from, tag, .. } = step.op {
                    receives.insert((from as usize, rank, tag), i);
                }
            }
        }
        let ticks = plans.iter().map(|p| vec![None; p.steps.len()]).collect();
        Clock { world, plans, ticks, receives, events: Vec::new() }
    }

    /// The first tick at which a step may run; `None` while a dependency has none.
    fn ready(&self, rank: usize, step: usize) -> Option<usize> {
        let after = &self.plans[rank].steps[step].after;
        after.iter().try_fold(0, |at, &on| Some(at.max(self.ticks[rank][on as usize]? + 1)))
    }

    fn put(&mut self, tick: usize, event: Event, steps: &[(usize, usize)]) {
        for &(rank, step) in steps {
            self.ticks[rank][step] = Some(tick);
        }
        if self.events.len() <= tick {
            self.events.resize(tick + 1, Vec::new());
        }
        self.events[tick].push(event);
    }

    /// Places a step if all it needs is placed; true if so.
    fn place(&mut self, rank: usize, step: usize) -> bool {
        let Some(tick) = self.ready(rank, step) else { return false };
        match &self.plans[rank].steps[step].op {
            Op::Phase(moves) => self.place_phase(rank, step, moves),
            &Op::Send { to, src, tag } => {
                let to = to as usize;
                let Some(&there) = self.receives.get(&(rank, to, tag)) else { return false };
                let Some(other) = self.ready(to, there) else { return false };
                self.put(
                    tick.max(other),
                    Event::Message { from: rank, to, bytes: src.len },
                    &[(rank, step), (to, there)],
                );
                true
            }
            Op::Recv { .. } => false,
            Op::Reduce { dst, srcs, .. } => {
                self.put(tick, Event::Reduce { rank, of: srcs.len(), bytes: dst.len }, &[(rank, step)]);
                true
            }
            Op::Copy { dst, .. } => {
                self.put(tick, Event::Copy { rank, bytes: dst.len }, &[(rank, step)]);
                true
            }
        }
    }

    fn place_phase(&mut self, rank: usize, step: usize, moves: &[Move]) -> bool {
        let node = self.world.shape.node_of(rank);
        let Some(number) = self.plans[rank].phases().iter().position(|&p| p as usize == step) else {
            return false;
        };
        let mut tick = 0;
        let mut steps = Vec::new();
        for &member in self.world.shape.ranks_on(node) {
            let member = member as usize;
            let phases = self.plans[member].phases();
            let (Some(&at), previous) =
                (phases.get(number), number.checked_sub(1).map(|p| phases[p] as usize))
            else {
                return false;
            };
            let before = previous.map_or(Some(0), |p| self.ticks[member][p].map(|t| t + 1));
            let (Some(ready), Some(before)) = (self.ready(member, at as usize), before) else { return false };
            tick = tick.max(ready).max(before);
            steps.push((member, at as usize));
        }
        self.put(tick, Event::Phase { node, label: phase_label(moves) }, &steps);
        true
    }

    fn run(mut self) -> Timeline {
        loop {
            let mut placed = false;
            for rank in 0..self.plans.len() {
                for step in 0..self.plans[rank].steps.len() {
                    if self.ticks[rank][step].is_none() {
                        placed |= self.place(rank, step);
                    }
                }
            }
            if !placed {
                return Timeline(self.events);
            }
        }
    }
}

fn phase_label(moves: &[Move]) -> String {
    let bytes: usize = moves.iter().map(|m| m.src.len).sum();
    let what = match moves.first().map(|m| (m.from, m.to, moves.len())) {
        None => "nothing",
        Some((Who::All, Who::All, _)) => "all_reduce",
        Some((Who::All, Who::One(_), 1)) => "reduce",
        Some((Who::All, Who::One(_), _)) => "reduce_scatter",
        Some((Who::One(_), Who::All, 1)) => "broadcast",
        Some((Who::One(_), Who::All, _)) => "all_gather",
        Some((Who::One(_), Who::One(_), _)) => "exchange",
    };
    format!("{what} {}", amount(bytes))
}

/// Bytes in at most five characters and a unit.
fn amount(bytes: usize) -> String {
    const UNITS: [&str; 4] = ["B", "K", "M", "G"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value.fract() > 0.05 && value < 100.0);
    format!("{value:.digits$}{}", UNITS[unit])
}

/// The lines above both forms: what is called, and how it is cut.
fn heading(world: &World) -> [String; 2] {
    let (Some(s), Some(call)) = (world.schedules.first(), world.calls.first()) else {
        return ["no ranks".to_owned(), String::new()];
    };
    let link = world.schedules.iter().map(|s| s.link_bytes).max().unwrap_or(0);
    let scratch = world.schedules.iter().map(|s| s.scratch_stride() * s.window).max().unwrap_or(0);
    let rounds = match (s.full_rounds, &s.tail) {
        (1, None) => "one round".to_owned(),
        (n, None) => {
            format!("{n} rounds of {}, {} in flight", amount(s.round_bytes), s.window.min(s.rounds()))
        }
        (n, Some(_)) => {
            format!(
                "{n} rounds of {} and a rest, {} in flight",
                amount(s.round_bytes),
                s.window.min(s.rounds())
            )
        }
    };
    [
        format!(
            "{} of {} x {} B on {} ranks ({}): {}",
            call.collective,
            call.count,
            call.elem,
            world.shape.size(),
            world.shape,
            s.algorithm
        ),
        format!("{rounds}; over a link at most {} each way; scratch {}", amount(link), amount(scratch)),
    ]
}

/// A table: ticks are rows, ranks are columns. `>2 64K` sends to rank 2, `<2 64K` receives, `+3 64K` combines three.
pub fn text(world: &World) -> String {
    let timeline = Clock::new(world).run();
    let size = world.shape.size();
    // Ranks of a node side by side.
    let columns: Vec<usize> = (0..world.shape.node_count())
        .flat_map(|n| world.shape.ranks_on(n).iter().map(|&r| r as usize))
        .collect();
    let mut rows: Vec<Vec<Vec<String>>> = Vec::new();
    for events in &timeline.0 {
        let mut cells = vec![Vec::new(); size];
        for event in events {
            match event {
                Event::Phase { node, label } => {
                    world
                        .shape
                        .ranks_on(*node)
                        .iter()
                        .for_each(|&r| cells[r as usize].push(format!("[{label}]")));
                }
                Event::Message { from, to, bytes } => {
                    cells[*from].push(format!(">{to} {}", amount(*bytes)));
                    cells[*to].push(format!("<{from} {}", amount(*bytes)));
                }
                Event::Reduce { rank, of, bytes } => cells[*rank].push(format!("+{of} {}", amount(*bytes))),
                Event::Copy { rank, bytes } => cells[*rank].push(format!("= {}", amount(*bytes))),
            }
        }
        rows.push(cells);
    }
    let width = |r: usize| {
        let longest = rows.iter().flat_map(|cells| &cells[r]).map(String::len).max().unwrap_or(0);
        longest.max(format!("rank {r}").len()) + 2
    };
    let widths: HashMap<usize, usize> = columns.iter().map(|&r| (r, width(r))).collect();
    let mut out = heading(world).join("\n") + "\n\n";
    out += "tick  ";
    columns.iter().for_each(|r| out += &format!("{:w$}", format!("rank {r}"), w = widths[r]));
    out = out.trim_end().to_owned() + "\n      ";
    for n in 0..world.shape.node_count() {
        let w: usize = world.shape.ranks_on(n).iter().map(|&r| widths[&(r as usize)]).sum();
        out += &format!("{:-<w$}  ", format!("node {n} "), w = w - 2);
    }
    out = out.trim_end().to_owned() + "\n";
    for (tick, cells) in rows.iter().enumerate() {
        for line in 0..cells.iter().map(Vec::len).max().unwrap_or(0) {
            let mut row = if line == 0 { format!("{:>4}  ", tick + 1) } else { " ".repeat(6) };
            for r in &columns {
                let cell = cells[*r].get(line).map_or("", String::as_str);
                row += &format!("{cell:w$}", w = widths[r]);
            }
            out += row.trim_end();
            out.push('\n');
        }
    }
    out
}

const COLUMN: usize = 92;
const ROW: usize = 46;
const LEFT: usize = 44;
const TOP: usize = 92;
const STYLE: &str = "text{font:11px system-ui,sans-serif;fill:#24303d}.h{font-size:14px;font-weight:600}\
.s{fill:#66727f}.c{text-anchor:middle}.n{fill:#eef2f6}.l{stroke:#c3ccd6;stroke-width:1}\
.p{fill:#d7e8f7;stroke:#5b93c5}.m{stroke:#d0672b;stroke-width:1.4;marker-end:url(#a)}.r{fill:#3f8f5f}.w{fill:#fff}";

/// A drawing: ranks are columns, ticks are rows, boxes are phases, arrows are messages, dots combine.
pub fn svg(world: &World) -> String {
    let timeline = Clock::new(world).run();
    let columns: Vec<usize> = (0..world.shape.node_count())
        .flat_map(|n| world.shape.ranks_on(n).iter().map(|&r| r as usize))
        .collect();
    let place: HashMap<usize, usize> = columns.iter().enumerate().map(|(i, &r)| (r, i)).collect();
    let x = |rank: usize| LEFT + COLUMN / 2 + place[&rank] * COLUMN;
    let [first, second] = heading(world);
    let longest = first.len().max(second.len()) * 7;
    let (width, height) =
        ((LEFT + columns.len() * COLUMN + 16).max(longest + 24), TOP + timeline.0.len() * ROW + 12);
    let bottom = height - 8;
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\">\
         <style>{STYLE}</style><defs><marker id=\"a\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" \
         markerHeight=\"7\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\" fill=\"#d0672b\"/></marker></defs>\
         <rect class=\"w\" width=\"{width}\" height=\"{height}\"/>\
         <text class=\"h\" x=\"12\" y=\"22\">{first}</text><text class=\"s\" x=\"12\" y=\"40\">{second}</text>"
    );
    for n in 0..world.shape.node_count() {
        let ranks = world.shape.ranks_on(n);
        let (left, w) = (x(ranks[0] as usize) - COLUMN / 2 + 3, ranks.len() * COLUMN - 6);
        let _ = write!(
            out,
            "<rect class=\"n\" x=\"{left}\" y=\"50\" width=\"{w}\" height=\"{}\" rx=\"6\"/>",
            bottom - 50
        );
        let _ = write!(out, "<text class=\"s c\" x=\"{}\" y=\"64\">node {n}</text>", left + w / 2);
    }
    for &r in &columns {
        let _ = write!(
            out,
            "<text class=\"c\" x=\"{0}\" y=\"80\">rank {r}</text><line class=\"l\" x1=\"{0}\" y1=\"86\" x2=\"{0}\" y2=\"{bottom}\"/>",
            x(r)
        );
    }
    for (tick, events) in timeline.0.iter().enumerate() {
        let y = TOP + tick * ROW;
        let _ =
            write!(out, "<text class=\"s c\" x=\"{}\" y=\"{}\">{}</text>", LEFT / 2, y + ROW / 2, tick + 1);
        for event in events {
            draw(&mut out, world, event, y, &x);
        }
    }
    out += "</svg>\n";
    out
}

fn draw(out: &mut String, world: &World, event: &Event, y: usize, x: &impl Fn(usize) -> usize) {
    let middle = y + ROW / 2;
    let _ = match event {
        Event::Phase { node, label } => {
            let ranks = world.shape.ranks_on(*node);
            let (left, w) = (x(ranks[0] as usize) - COLUMN / 2 + 7, ranks.len() * COLUMN - 14);
            let (what, bytes) = label.split_once(' ').unwrap_or((label, ""));
            write!(
                out,
                "<rect class=\"p\" x=\"{left}\" y=\"{}\" width=\"{w}\" height=\"{}\" rx=\"4\"/>\
                 <text class=\"c\" x=\"{2}\" y=\"{3}\">{what}</text><text class=\"c s\" x=\"{2}\" y=\"{4}\">{bytes}</text>",
                y + 4,
                ROW - 10,
                left + w / 2,
                middle - 3,
                middle + 10,
            )
        }
        Event::Message { from, to, bytes } => {
            let (from, to) = (x(*from), x(*to));
            // Past the column's line, and the label beside the arrow's tail.
            let (start, end, label) =
                if to > from { (from + 3, to - 3, from + 6) } else { (from - 3, to + 3, from - 34) };
            write!(
                out,
                "<line class=\"m\" x1=\"{start}\" y1=\"{}\" x2=\"{end}\" y2=\"{}\"/><text class=\"s\" x=\"{label}\" y=\"{}\">{}</text>",
                y + 8,
                y + ROW - 8,
                y + 8,
                amount(*bytes)
            )
        }
        Event::Reduce { rank, of, bytes } => write!(
            out,
            "<circle class=\"r\" cx=\"{0}\" cy=\"{1}\" r=\"5\"/><text class=\"c\" x=\"{0}\" y=\"{2}\">+{of} {3}</text>",
            x(*rank),
            middle - 6,
            middle + 12,
            amount(*bytes)
        ),
        Event::Copy { rank, bytes } => write!(
            out,
            "<circle class=\"n\" stroke=\"#5b93c5\" cx=\"{0}\" cy=\"{1}\" r=\"4\"/><text class=\"c\" x=\"{0}\" y=\"{2}\">= {3}</text>",
            x(*rank),
            middle - 6,
            middle + 12,
            amount(*bytes)
        ),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Collective;
    use crate::plan::{CallShape, Tuning};
    use crate::topology::GroupShape;

    fn world(shape: &GroupShape) -> World {
        World::new(shape, &CallShape::new(Collective::AllReduce, 4, 16 << 10), &Tuning::default()).unwrap()
    }

    #[test]
    fn every_step_of_a_round_is_shown() {
        let world = world(&GroupShape::from_labels(&[0, 1, 0, 1]));
        let text = text(&world);
        let steps: usize = world.schedules.iter().map(|s| s.body.steps.len()).sum();
        let shown = text
            .lines()
            .skip(5)
            .flat_map(|l| l.split("  "))
            .filter(|c| c.trim().contains(['>', '<', '+', '[']));
        assert_eq!(shown.count(), steps, "{text}");
        assert!(text.contains("hierarchical(sharded)") && text.contains("reduce_scatter"), "{text}");
    }

    #[test]
    fn a_drawing_has_an_arrow_for_every_message() {
        let world = world(&GroupShape::even(3, 1));
        let sends = |s: &crate::plan::Schedule| {
            s.body.steps.iter().filter(|s| matches!(s.op, Op::Send { .. })).count()
        };
        let expected: usize = world.schedules.iter().map(sends).sum();
        let svg = svg(&world);
        assert_eq!(svg.matches("class=\"m\"").count(), expected);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn amounts_are_short() {
        for (bytes, text) in [(0, "0B"), (1023, "1023B"), (1536, "1.5K"), (64 << 20, "64M")] {
            assert_eq!(amount(bytes), text);
        }
    }
}

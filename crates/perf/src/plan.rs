//! `smddp-perf plan`: the schedule of a call for a group that need not exist, as text or as a drawing.

use std::fmt::Write as _;

use smddp::{Collective, GroupShape, Settings};
use smddp_core::plan::check::World;
use smddp_core::plan::cost::{Model, ranking};
use smddp_core::plan::{CallShape, Override, Tuning, algorithms, candidates};
use smddp_core::plan::{Op, Span, render};

use crate::args::PlanArgs;
use crate::chart::size_label;
use crate::failure::Failure;
use crate::output::print;
use crate::workload::shape as sizes;

/// A drawing or table with more ranks than this is of no use to a reader; the plans themselves have no such limit.
const SHOWN_RANKS: usize = 64;

pub fn run(options: &PlanArgs) -> Result<(), Failure> {
    let (group, call, tuning) = what(options)?;
    let world = World::new(&group, &call, &tuning)?;
    if let Some(path) = &options.svg {
        return std::fs::write(path, render::svg(&world)).map_err(|e| Failure::file(path, e));
    }
    let mut out = match options.rank {
        Some(rank) => steps(&world, rank)?,
        None => render::text(&world),
    };
    out.push('\n');
    out.push_str(&prices(&group, &call, &tuning)?);
    print(&out)
}

/// The group, the call and the tuning that the command line describes.
fn what(options: &PlanArgs) -> Result<(GroupShape, CallShape, Tuning), Failure> {
    let usage = |text: String| Err(Failure::Usage(text));
    if options.collective == Collective::SendRecv {
        return usage("send/recv is a message, not a plan".to_owned());
    }
    // Counted before a shape is made, which takes memory for each rank.
    let size = match (options.local.as_slice(), options.nodes) {
        ([every], nodes) => every.saturating_mul(nodes.unwrap_or(2)),
        (each, Some(nodes)) if nodes != each.len() => {
            let named = each.len();
            return usage(format!("--local names {named} nodes, --nodes {nodes}: leave --nodes out"));
        }
        (each, _) => each.iter().fold(0usize, |sum, ranks| sum.saturating_add(*ranks)),
    };
    if size > SHOWN_RANKS {
        return usage(format!(
            "{size} ranks are too many to show: at most {SHOWN_RANKS}; give a smaller --nodes or --local"
        ));
    }
    let group = match options.local.as_slice() {
        [every] => GroupShape::even(options.nodes.unwrap_or(2), *every),
        each => GroupShape::uneven(each),
    };
    if options.root >= size {
        return usage(format!(
            "--root {} is not a rank: with {size} ranks give 0 to {}",
            options.root,
            size - 1
        ));
    }
    if let Some(rank) = options.rank.filter(|&r| r >= size) {
        return usage(format!("--rank {rank} is not a rank: with {size} ranks give 0 to {}", size - 1));
    }
    let Some((_, block)) = sizes(options.collective, options.dtype, options.bytes, size) else {
        return usage(format!(
            "--bytes {} holds no element of {} for each of {size} ranks",
            options.bytes, options.dtype
        ));
    };
    let mut tuning = Tuning::from_settings(&Settings::from_env()?)?;
    if let Some(name) = &options.algorithm {
        let Some(algorithm) = candidates(options.collective, group.node_count()).find(|a| a == name) else {
            let known: Vec<_> = candidates(options.collective, group.node_count()).collect();
            let others = if algorithms(options.collective).contains(&name.as_str()) {
                " of this many nodes"
            } else {
                ""
            };
            return usage(format!(
                "--algorithm {name}: no such algorithm of {}{others}; known here: {}",
                options.collective,
                known.join(", ")
            ));
        };
        let all = Override { collective: options.collective, from: 0, to: usize::MAX, algorithm };
        tuning.overrides.insert(0, all);
    }
    let root = if options.collective.rooted() { options.root } else { 0 };
    Ok((group, CallShape::rooted(options.collective, options.dtype.size(), block, root), tuning))
}

/// What each algorithm would take on a typical cluster, so that a choice can be judged.
fn prices(group: &GroupShape, call: &CallShape, tuning: &Tuning) -> Result<String, Failure> {
    let model = Model::default();
    let mut out = format!(
        "modelled time ({:.0} Gbit/s a node, {:.0} us between nodes):",
        model.link * 8e-9,
        model.latency * 1e6
    );
    for (name, seconds) in ranking(group, call, tuning, &model)? {
        let _ = write!(out, " {name} {:.1} us;", seconds * 1e6);
    }
    out.pop();
    out.push('\n');
    Ok(out)
}

/// One rank's first round, step by step, with what each waits for.
fn steps(world: &World, rank: usize) -> Result<String, Failure> {
    let schedule = &world.schedules[rank];
    let mut out = format!(
        "rank {rank} of {} ({}), {}: {} rounds of {}, {} in flight; first round:\n",
        world.shape.size(),
        world.shape,
        schedule.algorithm,
        schedule.rounds(),
        size_label(schedule.round_bytes),
        schedule.window
    );
    for (number, step) in schedule.plan(0).steps.iter().enumerate() {
        let text = match &step.op {
            Op::Phase(moves) => format!("phase with the node: {} moves", moves.len()),
            Op::Send { to, src, .. } => format!("send    {} to rank {to}", span(*src)),
            Op::Recv { from, dst, .. } => format!("receive {} from rank {from}", span(*dst)),
            Op::Reduce { dst, srcs, .. } => {
                let from: Vec<String> = srcs.iter().map(|s| span(*s)).collect();
                format!("combine {} = {}", span(*dst), from.join(" + "))
            }
            Op::Copy { dst, src } => format!("copy    {} = {}", span(*dst), span(*src)),
        };
        let after = if step.after.is_empty() { String::new() } else { format!("   after {:?}", step.after) };
        let _ = writeln!(out, "{number:>4}  {text}{after}");
    }
    Ok(out)
}

fn span(s: Span) -> String {
    format!("{:?}[{}..{}]", s.buf, s.off, s.off + s.len).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn plan(more: &str) -> Result<String, Failure> {
        let line = format!("smddp-perf plan {more}");
        let options = match crate::args::Cli::try_parse_from(line.split(' ')).unwrap().command {
            crate::args::Command::Plan(p) => p,
            other => panic!("{other:?}"),
        };
        let (group, call, tuning) = what(&options)?;
        let world = World::new(&group, &call, &tuning)?;
        world.check().unwrap();
        Ok(options.rank.map_or_else(|| Ok(render::text(&world)), |r| steps(&world, r))?
            + &prices(&group, &call, &tuning)?)
    }

    #[test]
    fn plans_of_many_shapes_are_shown_and_sound() {
        let text = plan("all_reduce --nodes 4 --local 2 --bytes 16M --algorithm ring").unwrap();
        assert!(text.contains("ring") && text.contains("rank 7") && text.contains("modelled time"), "{text}");
        assert!(plan("all_reduce --local 2,1,3 --bytes 64K").unwrap().contains("2+1+3"));
        assert!(plan("broadcast --root 3 --bytes 1K").unwrap().contains("rank 3"));
        assert!(plan("all_to_all --nodes 2 --rank 1").unwrap().contains("send"));
    }

    #[test]
    fn impossible_plans_say_why() {
        for (line, part) in [
            ("all_reduce --algorithm magic", "known here: sharded, ring"),
            ("all_reduce --nodes 1 --algorithm ring", "known here: one_phase"),
            ("broadcast --root 9", "give 0 to 3"),
            ("all_reduce --rank 4", "give 0 to 3"),
            ("all_reduce --bytes 2", "holds no element"),
            ("all_reduce --nodes 100", "too many to show"),
            ("all_reduce --nodes 65536 --local 65536", "4294967296 ranks are too many to show"),
            ("send/recv", "not a plan"),
        ] {
            let text = plan(line).unwrap_err().to_string();
            assert!(text.contains(part), "{line}: {text}");
        }
    }
}

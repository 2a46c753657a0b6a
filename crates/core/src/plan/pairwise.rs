//! All-to-all, gather and scatter: one message between every two ranks that have something for each other and sit on
//! different nodes, and one phase inside each node.

use super::build::{Builder, pass};
use super::context::Context;
use super::data::{Schedule, Span};
use super::rail::Rail;

fn input(cx: &Context<'_>, block: usize) -> Span {
    Span::input(block * cx.bytes(), cx.bytes())
}

fn output(cx: &Context<'_>, block: usize) -> Span {
    Span::output(block * cx.bytes(), cx.bytes())
}

/// All ranks, as one exchange.
fn everyone(cx: &Context<'_>) -> Rail {
    Rail { ranks: (0..cx.size() as u32).collect(), me: cx.rank }
}

fn name(cx: &Context<'_>) -> &'static str {
    cx.named(if cx.shape.node_count() == 1 { "one_phase" } else { "pairwise" })
}

/// Over each link: every block between this node's ranks and those of other nodes.
pub(super) fn all_to_all(cx: &Context<'_>) -> Schedule {
    if cx.call.splits.is_some() {
        return all_to_all_uneven(cx);
    }
    let (shape, me) = (cx.shape, cx.rank);
    let mut b = Builder::new(cx.local());
    let elsewhere = |r: &usize| !shape.same_node(*r, me);
    for r in everyone(cx).before().filter(elsewhere) {
        b.recv(r as u32, output(cx, r));
    }
    for r in everyone(cx).after().filter(elsewhere) {
        b.send(r as u32, input(cx, r));
    }
    let here = shape.ranks_on(cx.node());
    if here.len() == 1 {
        b.copy(output(cx, me), input(cx, me));
    } else {
        let pairs = (0..here.len()).flat_map(|from| (0..here.len()).map(move |to| (from, to)));
        let moves = pairs
            .map(|(from, to)| pass(from, to, input(cx, here[to] as usize), output(cx, here[from] as usize)));
        b.phase(moves.collect());
    }
    let link = here.len() * (cx.size() - here.len()) * cx.bytes();
    Schedule::single(name(cx), b.finish(), link)
}

/// No rank knows the others' splits, so that there can be no phase: every pair exchanges messages, empty ones too,
/// because the other side may expect something else and must then hear of it.
fn all_to_all_uneven(cx: &Context<'_>) -> Schedule {
    let mut b = Builder::new(cx.local());
    let Some((send, recv)) = &cx.call.splits else { return Schedule::single(name(cx), b.finish(), 0) };
    let elem = cx.call.elem;
    let block = |splits: &[usize], r: usize| (splits[..r].iter().sum::<usize>() * elem, splits[r] * elem);
    let sent = |r: usize| Span::input(0, 0).part(block(send, r));
    let received = |r: usize| Span::output(0, 0).part(block(recv, r));
    for r in everyone(cx).before() {
        b.recv_always(r as u32, received(r));
    }
    for r in everyone(cx).after() {
        b.send_always(r as u32, sent(r));
    }
    b.copy(received(cx.rank), sent(cx.rank));
    // Only this rank's part of the node's traffic is known here.
    let others = |splits: &[usize]| {
        (0..cx.size()).filter(|&r| !cx.shape.same_node(r, cx.rank)).map(|r| splits[r]).sum::<usize>()
    };
    let link = others(send).max(others(recv)) * elem;
    Schedule::single("pairwise", b.finish(), link)
}

/// Over the root's link: every block of other nodes' ranks.
pub(super) fn gather(cx: &Context<'_>) -> Schedule {
    rooted(cx, false)
}

/// Over the root's link: every block of other nodes' ranks.
pub(super) fn scatter(cx: &Context<'_>) -> Schedule {
    rooted(cx, true)
}

fn rooted(cx: &Context<'_>, out: bool) -> Schedule {
    let (shape, me, root) = (cx.shape, cx.rank, cx.call.root);
    let mut b = Builder::new(cx.local());
    let here = shape.ranks_on(cx.node());
    if me == root {
        for r in everyone(cx).after().filter(|&r| !shape.same_node(r, root)) {
            if out {
                b.send(r as u32, input(cx, r));
            } else {
                b.recv(r as u32, output(cx, r));
            }
        }
    } else if !shape.same_node(me, root) {
        if out {
            b.recv(root as u32, output(cx, 0));
        } else {
            b.send(root as u32, input(cx, 0));
        }
    }
    if here.len() > 1 && shape.same_node(me, root) {
        let to = shape.local_of(root);
        let moves = here.iter().enumerate().map(|(l, &r)| {
            let r = r as usize;
            if out {
                pass(to, l, input(cx, r), output(cx, 0))
            } else {
                pass(l, to, input(cx, 0), output(cx, r))
            }
        });
        b.phase(moves.collect());
    } else if me == root {
        let (dst, src) =
            if out { (output(cx, 0), input(cx, root)) } else { (output(cx, root), input(cx, 0)) };
        b.copy(dst, src);
    }
    let blocks = if shape.same_node(me, root) { cx.size() - here.len() } else { here.len() };
    Schedule::single(name(cx), b.finish(), blocks * cx.bytes())
}

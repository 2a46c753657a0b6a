//! Instructions of one blocking all_reduce of two ranks, or of one message each way, for callgrind: what noise of the machine cannot
//! hide.
//!
//! `valgrind --tool=callgrind --toggle-collect='*measured_call*' instructions all_reduce|sendrecv BYTES CALLS`
//!
//! The peer is a process of its own, not under callgrind. A measured call begins when the peer sleeps in it already, so that
//! its data is there and nobody waits: the same instructions every time.

#![allow(clippy::unwrap_used, reason = "a measurement that fails says where")]

use std::process::{Child, Command};
use std::time::Duration;

use smddp::{ReduceOp, Result, World};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [op, bytes, calls] = &arguments[..] else { panic!("expected OP, BYTES and CALLS") };
    let call: Call = match op.as_str() {
        "all_reduce" => |world, data, _| world.all_reduce(data, ReduceOp::Sum),
        "sendrecv" => messages,
        other => panic!("no operation {other}"),
    };
    let (bytes, calls): (usize, usize) = (bytes.parse().unwrap(), calls.parse().unwrap());
    let (mut data, mut other) = (vec![1f32; bytes / 4], vec![1f32; bytes / 4]);
    if std::env::var_os("RANK").is_some() {
        let world = World::init().unwrap();
        (0..calls + 2).for_each(|_| call(&world, &mut data, &mut other).unwrap());
        return;
    }
    let master = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = master.local_addr().unwrap().port();
    let mut peer = Peer(
        ranked(Command::new(std::env::current_exe().unwrap()).args(std::env::args().skip(1)), 1, port)
            .spawn()
            .unwrap(),
    );
    let variables = ranked(&mut Command::new("none"), 0, port)
        .get_envs()
        .map(|(k, v)| (k.to_owned(), v.unwrap().to_owned()))
        .collect::<Vec<_>>();
    // SAFETY: no other thread exists yet.
    variables.iter().for_each(|(name, value)| unsafe { std::env::set_var(name, value) });
    let world = World::init().unwrap();
    // Warm: plans are made, memory is mapped.
    (0..2).for_each(|_| call(&world, &mut data, &mut other).unwrap());
    for _ in 0..calls {
        peer.wait_until_asleep();
        measured_call(call, &world, &mut data, &mut other);
    }
    world.shutdown();
    assert!(peer.0.wait().unwrap().success());
}

type Call = fn(&World, &mut [f32], &mut [f32]) -> Result<()>;

#[inline(never)]
fn measured_call(call: Call, world: &World, data: &mut [f32], other: &mut [f32]) {
    call(world, data, other).unwrap();
}

/// `data` to the other rank, its own to `other`.
fn messages(world: &World, data: &mut [f32], other: &mut [f32]) -> Result<()> {
    let peer = 1 - world.rank();
    world.sendrecv(data, peer, other, peer, 0)
}

fn ranked(command: &mut Command, rank: usize, port: u16) -> &mut Command {
    let rank = rank.to_string();
    command.envs([
        ("RANK", rank.as_str()),
        ("LOCAL_RANK", rank.as_str()),
        ("WORLD_SIZE", "2"),
        ("LOCAL_WORLD_SIZE", "2"),
    ]);
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string()).env("SMDDP_BOOTSTRAP", "env")
}

struct Peer(Child);

impl Peer {
    /// Until its main thread has slept twice in a row: it waits in the call for this process.
    fn wait_until_asleep(&self) {
        let path = format!("/proc/{0}/task/{0}/stat", self.0.id());
        let mut asleep = 0;
        while asleep < 2 {
            let stat = std::fs::read_to_string(&path).unwrap();
            let state = stat.rsplit(')').next().unwrap().trim_start().chars().next();
            asleep = if state == Some('S') { asleep + 1 } else { 0 };
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It has ended, unless this process fails.
        let _ = self.0.kill();
    }
}

//! Instructions of one blocking all_reduce of two ranks, for callgrind: what noise of the machine cannot hide.
//!
//! `valgrind --tool=callgrind --toggle-collect='*measured_call*' instructions BYTES CALLS`
//!
//! The peer is a process of its own, not under callgrind. A measured call begins when the peer sleeps in it already, so that
//! its data is there and nobody waits: the same instructions every time.

#![allow(clippy::unwrap_used, reason = "a measurement that fails says where")]

use std::process::{Child, Command};
use std::time::Duration;

use smddp::{ReduceOp, World};

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().unwrap()).collect();
    let [bytes, calls] = arguments[..] else { panic!("expected BYTES and CALLS") };
    let mut data = vec![1f32; bytes / 4];
    if std::env::var_os("RANK").is_some() {
        let world = World::init().unwrap();
        (0..calls + 2).for_each(|_| world.all_reduce(&mut data, ReduceOp::Sum).unwrap());
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
    (0..2).for_each(|_| world.all_reduce(&mut data, ReduceOp::Sum).unwrap());
    for _ in 0..calls {
        peer.wait_until_asleep();
        measured_call(&world, &mut data);
    }
    world.shutdown();
    assert!(peer.0.wait().unwrap().success());
}

#[inline(never)]
fn measured_call(world: &World, data: &mut [f32]) {
    world.all_reduce(data, ReduceOp::Sum).unwrap();
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

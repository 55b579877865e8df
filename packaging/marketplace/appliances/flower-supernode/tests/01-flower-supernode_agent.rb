require 'json'
require_relative '../../../lib/community/app_handler'

# Behaviour of supernode-agent beyond the certification tests.
describe 'supernode-agent' do
    include_context('vm_handler')

    def ssh(command)
        @info[:vm].ssh(command)
    end

    def main_pid
        output_of('systemctl show -p MainPID --value flower-supernode.service')
    end

    def output_of(command)
        ssh(command).stdout.to_s.strip
    end

    # Waits once, before the first test.
    before(:all) do
        limit = Time.now + 600
        sleep 5 until @info[:vm].ssh('supernode-agent status --ready').success? || Time.now > limit
    end

    it 'reports that the node is ready' do
        ssh('supernode-agent status --ready').expect_success
        ssh('/opt/flower/scripts/health-check.sh').expect_success
    end

    it 'has read the parameters of the appliance' do
        arguments = JSON.parse(output_of("docker inspect -f '{{json .Args}}' flower-supernode"))
        expect(arguments.join(' ')).to include(APP_CONTEXT_PARAMS[:FL_SUPERLINK_ADDRESS])
    end

    it 'logs no GPU warning if the GPU is not enabled' do
        warnings = output_of('journalctl -b -u flower-supernode -p warning -o cat')
        expect(warnings).not_to include('no usable GPU')
    end

    it 'finds no fault in configuration, Docker and image' do
        checks = JSON.parse(output_of('supernode-agent check vm --json'))['checks']
        ids = %w[settings configuration docker image]
        ours = checks.select { |check| ids.include?(check['id']) }
        expect(ours.reject { |check| check['level'] == 'OK' }).to eq([])
    end

    it 'gives the container no privileges' do
        host = JSON.parse(output_of("docker inspect -f '{{json .HostConfig}}' flower-supernode"))
        expect(host['Privileged']).to be(false)
        expect(host['CapDrop']).to include('ALL')
    end

    it 'boots without an ordering cycle' do
        expect(output_of("journalctl -b -o cat | grep -c 'ordering cycle'")).to eq('0')
    end

    it 'does not touch the container when the agent is killed' do
        container = output_of("docker inspect -f '{{.Id}} {{.State.StartedAt}}' flower-supernode")
        agent = main_pid
        ssh('systemctl kill --kill-whom=main --signal=KILL flower-supernode.service').expect_success
        limit = Time.now + 120
        sleep 5 until [agent, '0'].none?(main_pid) || Time.now > limit
        expect(main_pid).not_to eq(agent)
        same = output_of("docker inspect -f '{{.Id}} {{.State.StartedAt}}' flower-supernode")
        expect(same).to eq(container)
    end

    it 'stops the container with the unit, and starts it again' do
        ssh('systemctl stop flower-supernode.service').expect_success
        running = output_of("docker inspect -f '{{.State.Running}}' flower-supernode")
        expect(running).not_to eq('true')
        ssh('systemctl start flower-supernode.service').expect_success
        ssh('supernode-agent status --ready').expect_success
    end
end
